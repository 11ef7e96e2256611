"""Chat completions, plain and streamed, against an inference server on a real port."""

import json
import socket
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.domain.generation import Chunk, Failed
from models.errors import (
    CapacityError,
    ConflictError,
    NotFoundError,
    TuneryError,
    UnavailableError,
    UnprocessableError,
)
from models.registry import inference_servers
from models.registry.inference_servers import Announcement
from tests.api.calls import chat, expect
from tests.api.fake_inference import FINISHED, HELLO, STARTED, Cut, FakeInference

DONE = "[DONE]"
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 2,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def sse(response: httpx2.Response) -> list[Any]:
    """Return the events of a stream, parsed; the closing mark stays a string."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == DONE else json.loads(item) for item in data]


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.get("choices", [])]
    return "".join(c["delta"].get("content", "") for c in choices if c["index"] == index)


def test_an_answer_has_text_finish_reason_usage_and_fingerprint(
    client: TestClient, inference: FakeInference
) -> None:
    response = chat(client, temperature=0, max_tokens=5, seed=4, stop="X", top_p=0.5)
    body = response.json()
    assert response.status_code == 200, body
    assert (body["object"], body["model"]) == ("chat.completion", "base")
    assert body["id"].startswith("chatcmpl-")
    assert (body["usage"], body["system_fingerprint"]) == (USAGE, "fp_fake")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    sent = inference.requests[0]
    assert (sent.base_model, sent.adapter) == ("base", None)
    assert sent.sampling.model_dump(exclude_defaults=True) == {
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 4,
        "stop": ("X",),
    }
    assert sent.request_id == response.headers["x-request-id"]


def test_a_stream_ends_with_finish_reason_usage_and_done(
    client: TestClient, inference: FakeInference
) -> None:
    events = sse(chat(client, stream=True, stream_options={"include_usage": True}))
    assert events[-1] == DONE
    *chunks, usage = events[:-1]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == "Hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]) == ([], USAGE)
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert {chunk["id"] for chunk in [*chunks, usage]} == {usage["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_without_include_usage_has_none(
    client: TestClient, inference: FakeInference
) -> None:
    events = sse(chat(client, stream=True))
    assert events[-1] == DONE
    assert not any("usage" in chunk for chunk in events[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_two_choices_are_kept_apart(
    client: TestClient, inference: FakeInference, stream: bool
) -> None:
    inference.events = [
        STARTED,
        Chunk(index=1, text="b"),
        Chunk(index=0, text="a"),
        Chunk(index=1, text="B", finish_reason="length"),
        Chunk(index=0, text="A", finish_reason="stop"),
        FINISHED,
    ]
    response = chat(client, n=2, stream=stream)
    assert inference.requests[0].sampling.n == 2
    if stream:
        chunks = sse(response)[:-1]
        assert (text_of(chunks, 0), text_of(chunks, 1)) == ("aA", "bB")
        return
    choices = response.json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["aA", "bB"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]


REFUSALS = [
    (NotFoundError("No such model.", param="model", code="model_not_found"), {}),
    (ConflictError("Another base.", code="base_mismatch"), {"x-should-retry": "false"}),
    (UnprocessableError("It does not load.", code="adapter_broken"), {}),
    (CapacityError("Full.", retry_after=3), {"retry-after": "3"}),
    (UnavailableError("Stopping.", retry_after=5), {"retry-after": "5"}),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "headers"), REFUSALS)
def test_a_refusal_before_the_start_keeps_its_status(
    client: TestClient,
    inference: FakeInference,
    error: TuneryError,
    headers: dict[str, str],
    stream: bool,
) -> None:
    inference.refuse(error)
    response = chat(client, stream=stream)
    assert expect(response, error.status_code, error.param, error.code) == error.message
    assert headers.items() <= dict(response.headers).items()


def test_a_refusal_that_is_no_error_body_is_503(
    client: TestClient, inference: FakeInference
) -> None:
    inference.refusal = (502, b"<html>proxy</html>")
    response = chat(client)
    assert "502" in expect(response, 503, None, "inference_server_lost")
    assert int(response.headers["retry-after"]) > 0


BREAKS = [
    (Failed(error=CapacityError("No memory.", code="oom").to_dict()), "oom", 429),
    (Cut(), "inference_server_lost", 503),
    (b"{no json", "inference_server_lost", 503),
]


@pytest.mark.parametrize(("last", "code", "status"), BREAKS)
def test_a_break_in_mid_stream_is_an_error_event_and_never_done(
    client: TestClient, inference: FakeInference, last: object, code: str, status: int
) -> None:
    inference.events = [*HELLO[:2], last]
    events = sse(chat(client, stream=True))
    assert text_of(events[:-1]) == "Hel"
    assert sorted(events[-1]["error"]) == ["code", "message", "param", "type"]
    assert events[-1]["error"]["code"] == code
    assert DONE not in events


@pytest.mark.parametrize(("last", "code", "status"), BREAKS)
def test_a_break_in_a_plain_answer_is_an_error_and_no_half_answer(
    client: TestClient, inference: FakeInference, last: object, code: str, status: int
) -> None:
    inference.events = [*HELLO[:2], last]
    assert "Hel" not in expect(chat(client), status, None, code)


def test_a_stream_that_just_ends_is_no_success(
    client: TestClient, inference: FakeInference
) -> None:
    inference.events = HELLO[:-1]
    expect(chat(client), 503, None, "inference_server_lost")
    events = sse(chat(client, stream=True))
    assert events[-1]["error"]["code"] == "inference_server_lost"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
    ],
)
def test_what_would_change_the_answer_is_refused(
    client: TestClient, inference: FakeInference, name: str, value: object
) -> None:
    expect(chat(client, **{name: value}), 400, name, "unsupported_parameter")
    assert inference.requests == []


def test_explicit_nulls_and_hints_are_fine(client: TestClient, inference: FakeInference) -> None:
    nulls = ("max_tokens", "temperature", "top_p", "n", "seed", "stop", "tools", "stream", "user")
    response = chat(client, **dict.fromkeys(nulls), store=True, service_tier="auto", logprobs=False)
    assert response.status_code == 200, response.text
    assert inference.requests[0].sampling.temperature == 1


def test_an_earlier_answer_can_be_sent_back_as_it_came(
    client: TestClient, inference: FakeInference
) -> None:
    answer = chat(client).json()["choices"][0]["message"]
    user = {"role": "user", "content": "Hi"}
    response = chat(client, messages=[user, answer | {"annotations": [], "tool_calls": []}, user])
    assert response.status_code == 200, response.text
    sent = inference.requests[1].messages or []
    assert [message.role for message in sent] == ["user", "assistant", "user"]
    assert sent[1].content == "Hello"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "base", "messages": [{"role": "user", "content": "a\\u0000"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "\xff"}]}',
    ],
)
def test_text_that_cannot_be_stored_is_400_before_any_model_sees_it(
    client: TestClient, inference: FakeInference, body: bytes
) -> None:
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert sorted(response.json()["error"]) == ["code", "message", "param", "type"]
    assert inference.requests == []


def test_an_unknown_model_is_never_answered_by_the_base(
    client: TestClient, inference: FakeInference
) -> None:
    expect(chat(client, model="ft:base:local::nothing1"), 404, "model", "model_not_found")
    assert inference.requests == []


def test_a_server_that_is_gone_but_still_announced_is_503(
    client: TestClient, database: Database
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with database.write() as session:
            gone = Announcement("gone", "base", "f" * 64, "nf4", url)
            inference_servers.announce(session, gone, 60)
        response = chat(client)
    expect(response, 503, None, "inference_server_lost")
    assert int(response.headers["retry-after"]) > 0


def test_a_server_whose_time_is_over_is_not_asked(
    client: TestClient, inference: FakeInference, database: Database
) -> None:
    with database.write() as session:
        old = Announcement("fake-1", "base", "f" * 64, "nf4", inference.url)
        inference_servers.announce(session, old, -1)
    expect(chat(client), 503, "model", "no_inference_server")
    assert inference.requests == []
