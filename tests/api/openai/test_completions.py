"""Text completions, plain and streamed, against an inference server on a real port."""

from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from models.domain.generation import Chunk, Failed, Finished, TokenLogprob, TopLogprob
from models.errors import CapacityError, NotFoundError
from tests.api.calls import expect
from tests.api.fake_inference import FINISHED, HELLO, STARTED, FakeInference
from tests.api.openai.test_chat import BREAKS, DONE, USAGE, sse


def complete(client: TestClient, **fields: Any) -> httpx2.Response:
    return client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **fields})


def token(text: str, logprob: float | None, offset: int) -> TokenLogprob:
    raw = tuple(text.encode())
    top = () if logprob is None else (TopLogprob(text=text, bytes=raw, logprob=logprob),)
    return TokenLogprob(text=text, bytes=raw, logprob=logprob, offset=offset, top=top)


def test_a_text_is_continued(client: TestClient, inference: FakeInference) -> None:
    body = complete(client, max_tokens=5, temperature=0, stop=["X"]).json()
    assert (body["object"], body["model"], body["usage"]) == ("text_completion", "base", USAGE)
    assert body["id"].startswith("cmpl-")
    assert body["system_fingerprint"] == "fp_fake"
    assert body["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}
    ]
    [sent] = inference.requests
    assert (sent.prompt, sent.messages, sent.echo, sent.sampling.stop) == (
        "Hi",
        None,
        False,
        ("X",),
    )


def test_several_prompts_are_numbered_and_their_usage_added(
    client: TestClient, inference: FakeInference
) -> None:
    inference.events = [
        STARTED,
        Chunk(index=1, text="b", finish_reason="length"),
        Chunk(index=0, text="a", finish_reason="stop"),
        FINISHED,
    ]
    body = complete(client, prompt=["x", "y"], n=2).json()
    assert [(each["index"], each["text"]) for each in body["choices"]] == [
        (0, "a"),
        (1, "b"),
        (2, "a"),
        (3, "b"),
    ]
    assert body["usage"]["total_tokens"] == 2 * 9
    assert sorted(str(each.prompt) for each in inference.requests) == ["x", "y"]


def test_log_probabilities_have_the_older_form(
    client: TestClient, inference: FakeInference
) -> None:
    inference.events = [
        STARTED,
        Chunk(text="Hi", logprobs=(token("Hi", None, 0),)),
        Chunk(text=" you", logprobs=(token(" you", -0.5, 2),), finish_reason="stop"),
        FINISHED,
    ]
    [choice] = complete(client, echo=True, logprobs=1).json()["choices"]
    assert choice["text"] == "Hi you"
    assert choice["logprobs"] == {
        "tokens": ["Hi", " you"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {" you": -0.5}],
        "text_offset": [0, 2],
    }
    assert inference.requests[0].echo


def test_the_best_are_those_with_the_highest_mean_log_probability(
    client: TestClient, inference: FakeInference
) -> None:
    def drawn(index: int, text: str, *logprobs: float) -> Chunk:
        tokens = tuple(token("t", value, 0) for value in logprobs)
        return Chunk(index=index, text=text, logprobs=tokens, finish_reason="stop")

    inference.events = [
        STARTED,
        drawn(0, "middle", -0.5, -0.5),
        drawn(1, "worst", -0.1, -3.0),
        drawn(2, "best", -0.2),
        Finished(prompt_tokens=7, completion_tokens=9),
    ]
    body = complete(client, n=2, best_of=3).json()
    assert [(each["index"], each["text"]) for each in body["choices"]] == [
        (0, "best"),
        (1, "middle"),
    ]
    assert [each["logprobs"] for each in body["choices"]] == [None, None]
    assert body["usage"]["completion_tokens"] == 9
    assert inference.requests[0].sampling.n == 3


def test_a_stream_has_chunks_usage_and_an_end(client: TestClient, inference: FakeInference) -> None:
    response = complete(client, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = sse(response)
    assert done == DONE
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"text_completion"}
    assert [chunk["usage"] for chunk in chunks] == [None, None, None]
    assert (usage["choices"], usage["usage"]) == ([], USAGE)


def test_streams_of_several_prompts_interleave(
    client: TestClient, inference: FakeInference
) -> None:
    chunks = sse(complete(client, prompt=["x"] * 12, stream=True))[:-1]
    texts = [""] * 12
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["Hello"] * 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("No such model.", param="model", code="model_not_found"),
        CapacityError("Full.", retry_after=3),
    ],
)
def test_a_refusal_before_the_start_keeps_its_status(
    client: TestClient, inference: FakeInference, error: Any, stream: bool
) -> None:
    inference.refuse(error)
    response = complete(client, prompt=["x", "y"], stream=stream)
    assert expect(response, error.status_code, error.param, error.code) == error.message


@pytest.mark.parametrize(("last", "code", "status"), BREAKS)
def test_a_break_is_an_error_and_never_done(
    client: TestClient, inference: FakeInference, last: object, code: str, status: int
) -> None:
    inference.events = [*HELLO[:2], last]
    assert "Hel" not in expect(complete(client), status, None, code)
    events = sse(complete(client, prompt=["x", "y"], stream=True))
    assert events[-1]["error"]["code"] == code
    assert DONE not in events


def test_a_failed_prompt_fails_the_answer(client: TestClient, inference: FakeInference) -> None:
    inference.events = [STARTED, Failed(error=CapacityError("No memory.", code="oom").to_dict())]
    expect(complete(client, prompt=["x"] * 20), 429, None, "oom")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"prompt": None}, "prompt"),
        ({"best_of": 2, "stream": True}, None),
        ({"logprobs": 6}, "logprobs"),
        ({"best": 2}, "best"),
    ],
)
def test_what_is_not_possible_is_refused_and_named(
    client: TestClient, inference: FakeInference, fields: dict[str, Any], param: str | None
) -> None:
    response = complete(client, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert inference.requests == []


def test_an_unknown_model_is_never_answered_by_the_base(
    client: TestClient, inference: FakeInference
) -> None:
    expect(complete(client, model="ft:base:local::nothing1"), 404, "model", "model_not_found")
    assert inference.requests == []
