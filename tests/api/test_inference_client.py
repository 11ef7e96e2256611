"""The client of inference servers: what comes over the wire becomes events or one clear error."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from api.inference_client import InferenceClient
from models.domain.generation import Chunk, GenerateEvent, GenerateRequest, SamplingParams
from models.domain.rows import ChatMessage
from models.errors import (
    AuthenticationError,
    CapacityError,
    ConflictError,
    PermissionDeniedError,
    TuneryError,
    UnavailableError,
)
from tests.api.fake_inference import HELLO, STARTED, Cut, FakeInference, running_fake

REQUEST = GenerateRequest(
    request_id="req_1",
    base_model="base",
    adapter=None,
    messages=[ChatMessage(role="user", content="Grüße \N{SNOWMAN}")],
    sampling=SamplingParams(temperature=0.1, seed=2**62),
)


@pytest.fixture(scope="module")
def shared_fake() -> Iterator[FakeInference]:
    with running_fake() as made:
        yield made


@pytest.fixture
def fake(shared_fake: FakeInference) -> FakeInference:
    shared_fake.events, shared_fake.refusal = list(HELLO), None
    shared_fake.requests.clear()
    shared_fake.headers.clear()
    return shared_fake


def ask(url: str, seen: list[GenerateEvent] | None = None) -> list[GenerateEvent]:
    """Ask once; `seen` holds what came before an error."""
    events: list[GenerateEvent] = [] if seen is None else seen

    async def run() -> None:
        client = InferenceClient("between-us")
        try:
            async with aclosing(client.generate(url, REQUEST)) as stream:
                async for event in stream:
                    events.append(event)
        finally:
            await client.aclose()

    asyncio.run(run())
    return events


def test_request_token_and_events_cross_the_wire_unchanged(fake: FakeInference) -> None:
    assert ask(fake.url) == HELLO
    assert fake.requests == [REQUEST]
    assert fake.headers[0]["authorization"] == "Bearer between-us"


def test_a_refusal_comes_back_as_the_class_it_was(fake: FakeInference) -> None:
    fake.refuse(CapacityError("Full.", code="queue_full", retry_after=7))
    with pytest.raises(CapacityError, match=r"^Full\.$") as raised:
        ask(fake.url)
    assert (raised.value.code, raised.value.retry_after) == ("queue_full", 7)
    fake.refuse(ConflictError("Another base.", param="model"))
    with pytest.raises(ConflictError) as conflict:
        ask(fake.url)
    assert conflict.value.param == "model"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"error": "text"}', b"null"])
def test_an_answer_that_is_no_error_object_is_a_lost_server(
    fake: FakeInference, body: bytes
) -> None:
    fake.refusal = (500, body)
    with pytest.raises(UnavailableError) as raised:
        ask(fake.url)
    assert raised.value.code == "inference_server_lost"
    assert raised.value.retry_after


@pytest.mark.parametrize("last", [Cut(), b"{half", b'{"type": "unknown"}', None])
def test_a_broken_stream_yields_what_came_and_then_an_error(
    fake: FakeInference, last: object
) -> None:
    fake.events = [STARTED, Chunk(text="a"), *([] if last is None else [last])]
    seen: list[GenerateEvent] = []
    with pytest.raises(UnavailableError) as raised:
        ask(fake.url, seen)
    assert raised.value.code == "inference_server_lost"
    assert seen == fake.events[:2]


def test_blank_lines_keep_a_stream_alive_and_say_nothing(fake: FakeInference) -> None:
    fake.events = [HELLO[0], b"", *HELLO[1:]]
    assert ask(fake.url) == HELLO


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nobody.invalid"])
def test_a_server_that_cannot_be_reached_is_unavailable(url: str) -> None:
    with pytest.raises(UnavailableError, match="Send the request again") as raised:
        ask(url)
    assert isinstance(raised.value, TuneryError)
    assert raised.value.status_code == 503


def test_only_a_newline_ends_an_event(fake: FakeInference) -> None:
    """JSON leaves U+2028 and U+0085 as they are, and `str.splitlines` breaks a text there."""
    fake.events = [STARTED, Chunk(text="a\u2028b\u2029c\x85d\x0b\x1ce\r\n"), HELLO[-1]]
    assert ask(fake.url) == fake.events


@pytest.mark.parametrize("error", [AuthenticationError("Who?"), PermissionDeniedError("No.")])
def test_a_refused_token_is_the_services_fault_and_not_the_callers(
    fake: FakeInference, error: TuneryError
) -> None:
    fake.refuse(error)
    with pytest.raises(UnavailableError, match="TUNERY_INFERENCE__TOKEN"):
        ask(fake.url)
