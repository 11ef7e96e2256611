"""What requests may ask of an answer, over real HTTP: formats, tools, scores, texts, patience."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.types import Message

from models.domain.generation import Chunk, Finished, GenerateEvent, TokenLogprob
from tests.worker.chats import with_template
from tests.worker.inference.conftest import TinyServer, Tokenizers, running
from tests.worker.inference.test_server import (
    ask,
    body,
    is_idle,
    refusal,
    slow_down,
    text_of,
    wait_for,
)
from tests.worker.test_tool_syntax import QWEN
from worker.chat import ChatRenderer
from worker.inference.engine.grammar import Vocabulary
from worker.inference.residency import Residency
from worker.inference.server import GenerateEndpoint
from worker.inference.service import InferenceService

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["tide", "wind"]},
        "heights": {"type": "array", "items": {"enum": [1, 2.5]}, "minItems": 1, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["kind", "heights", "sure"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "harbour", "parameters": SCHEMA}}


def text_body(prompt: str | list[int], **changes: Any) -> dict[str, Any]:
    """A request to continue a text without a template."""
    sampling = changes.pop("sampling", {})
    request = body(**sampling) | {"prompt": prompt, **changes}
    del request["messages"]
    return request


def logprobs_of(events: list[GenerateEvent]) -> list[TokenLogprob]:
    return [each for event in events if isinstance(event, Chunk) for each in event.logprobs]


@pytest.fixture(scope="module")
def vocabulary(tokenizers: Tokenizers) -> Vocabulary:
    return Vocabulary(tokenizers[0], tokenizers[1].stop_ids)


@pytest.fixture(autouse=True)
def _one_vocabulary(tiny_server: TinyServer, vocabulary: Vocabulary) -> None:
    """Make the vocabulary once: it takes a second."""
    tiny_server.service._vocabulary = vocabulary


@pytest.mark.parametrize("temperature", [0, 1])
def test_every_choice_fulfils_the_schema(client: httpx.Client, temperature: float) -> None:
    request = body(max_tokens=100, temperature=temperature, seed=5, n=2)
    events = ask(client, request | {"json_schema": SCHEMA})
    for index in range(2):
        jsonschema.validate(json.loads(text_of(events, index)), SCHEMA)
    ends = [e.finish_reason for e in events if isinstance(e, Chunk) and e.finish_reason]
    assert ends == ["stop", "stop"]


def test_a_schema_that_cannot_be_followed_is_400(client: httpx.Client) -> None:
    status, error = refusal(client, body() | {"json_schema": {"type": "objekt"}})
    assert (status, error["param"], error["code"]) == (
        400,
        "response_format",
        "invalid_json_schema",
    )


@pytest.fixture
def tool_client(tiny_server: TinyServer, tokenizers: Tokenizers) -> Iterator[httpx.Client]:
    """The tiny server with a chat template that knows tools."""
    renderer = ChatRenderer(with_template(tokenizers[0], QWEN))
    residency = Residency(tiny_server.engine, tiny_server.adapters, renderer.template_sha256)
    service = InferenceService(tiny_server.engine, renderer, residency, tiny_server.base, {})
    service._vocabulary = tiny_server.service._vocabulary
    with running(service) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"name": "harbour"}])
def test_a_required_call_is_made_with_arguments_that_fit(
    tool_client: httpx.Client, choice: object
) -> None:
    request = body(max_tokens=150, temperature=1, seed=3)
    events = ask(tool_client, request | {"tools": [TOOL], "tool_choice": choice})
    chunks = [event for event in events if isinstance(event, Chunk)]
    calls: dict[int, tuple[str, str]] = {}
    for delta in (delta for chunk in chunks for delta in chunk.tool_calls):
        if delta.name is not None:
            calls[delta.index] = (delta.name, "")
        name, arguments = calls[delta.index]
        calls[delta.index] = (name, arguments + delta.arguments)
    assert calls
    assert chunks[-1].finish_reason in ("tool_calls", "length")
    assert text_of(events) == ""
    name, arguments = calls[0]
    assert name == "harbour"
    jsonschema.validate(json.loads(arguments), SCHEMA)


def test_tools_that_the_template_would_ignore_are_refused(client: httpx.Client) -> None:
    status, error = refusal(client, body() | {"tools": [TOOL]})
    assert (status, error["code"]) == (400, "template_without_tools")


def test_a_text_is_continued_without_a_template(
    client: httpx.Client, tokenizers: Tokenizers
) -> None:
    ids = tokenizers[0].encode("The tide", add_special_tokens=False)
    as_text, as_ids = (ask(client, text_body(prompt)) for prompt in ("The tide", ids))
    assert as_text[0].model_dump()["prompt_tokens"] == len(ids)
    assert text_of(as_text) == text_of(as_ids) != text_of(ask(client, body()))


def test_a_text_is_echoed_and_scored(client: httpx.Client, tokenizers: Tokenizers) -> None:
    prompt = "The tide is 日本"
    ids = tokenizers[0].encode(prompt, add_special_tokens=False)
    request = text_body(prompt, echo=True, sampling={"max_tokens": 0, "logprobs": 2})
    events = ask(client, request)
    assert text_of(events) == prompt
    scored = logprobs_of(events)
    assert b"".join(bytes(each.bytes) for each in scored) == prompt.encode()
    assert [each.logprob is None for each in scored] == [True, *[False] * (len(ids) - 1)]
    assert len(scored[1].top) == 2
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.prompt_tokens, finished.completion_tokens) == (len(ids), 0)
    more = ask(client, text_body(prompt, echo=True, sampling={"max_tokens": 3, "logprobs": 0}))
    assert [each.logprob for each in logprobs_of(more)[1 : len(ids)]] == pytest.approx(
        [each.logprob for each in scored[1:]], abs=1e-3
    )
    assert text_of(more).startswith(prompt)


def test_log_probabilities_name_the_tokens_of_the_text(client: httpx.Client) -> None:
    events = ask(client, body(logprobs=3))
    scored = logprobs_of(events)
    whole = b"".join(bytes(each.bytes) for each in scored)
    assert whole.decode(errors="replace").startswith(text_of(events)[:5])
    assert all(len(each.top) == 3 for each in scored)
    # Greedy: the drawn token is the likeliest.
    assert [each.top[0].logprob for each in scored] == [each.logprob for each in scored]


def test_a_bias_decides_what_is_drawn(client: httpx.Client, tokenizers: Tokenizers) -> None:
    [token] = tokenizers[0].encode(" tide", add_special_tokens=False)[:1]
    events = ask(client, body(logit_bias={str(token): 100}, max_tokens=4, logprobs=0))
    assert len({each.text for each in logprobs_of(events)}) == 1


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (body(logit_bias={"2048": 1}), "logit_bias"),
        (body(logit_bias={"5": 101}), "sampling.logit_bias.5"),
        (body(top_k=-1), "sampling.top_k"),
        (body(logprobs=21), "sampling.logprobs"),
        (text_body([5, 2048]), "prompt"),
        (text_body([-1]), "prompt"),
        (text_body([]), "prompt"),
        (text_body(""), "prompt"),
        (body() | {"prompt": "x"}, "the body"),
    ],
)
def test_what_makes_no_sense_is_400_and_named(
    client: httpx.Client, request_: dict[str, Any], param: str
) -> None:
    status, error = refusal(client, request_)
    assert (status, error["param"]) == (400, param)


def test_special_tokens_in_a_text_stay_text(client: httpx.Client, tokenizers: Tokenizers) -> None:
    typed = "a<|im_end|>b"
    events = ask(client, text_body(typed, echo=True, sampling={"max_tokens": 0, "logprobs": 0}))
    assert len(logprobs_of(events)) > 4
    assert text_of(events) == typed


def test_a_reader_that_takes_nothing_is_given_up(tiny_server: TinyServer) -> None:
    slow_down(tiny_server, 0.002)
    endpoint = GenerateEndpoint(tiny_server.service, stall_seconds=0.3)
    request = json.dumps(body(max_tokens=5000, temperature=1, seed=1)).encode()
    sent: list[Message] = []

    async def run() -> None:
        left = [{"type": "http.request", "body": request, "more_body": False}]
        forever = asyncio.Event()

        async def receive() -> Message:
            if not left:
                await forever.wait()
            return left.pop()

        async def send(message: Message) -> None:
            if len(sent) > 3:
                await forever.wait()
            sent.append(message)

        await asyncio.wait_for(endpoint({"type": "http"}, receive, send), 20)

    asyncio.run(run())
    assert len(sent) == 4
    wait_for(lambda: is_idle(tiny_server))
    tiny_server.service.close()
