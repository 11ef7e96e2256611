"""From the engine's events to the wire's."""

import asyncio

import pytest

from models.domain.generation import Chunk, Finished
from models.errors import TuneryError
from worker.inference.answer import Answer
from worker.inference.engine.errors import (
    EngineClosedError,
    EngineError,
    GenerationError,
    RequestRefusedError,
)
from worker.inference.engine.grammar import Vocabulary
from worker.inference.engine.params import TokenEvent
from worker.inference.writer import ChunkWriter


def new_answer(n: int) -> Answer:
    writer = ChunkWriter(Vocabulary(None, ()))  # type: ignore[arg-type]  # nothing to name
    return Answer(n=n, prompt_tokens=5, system_fingerprint="fp", writer=writer)


def events(*emitted: tuple[int, TokenEvent | EngineError], n: int = 1) -> list[Chunk | Finished]:
    async def run() -> list[Chunk | Finished]:
        answer = new_answer(n)
        for index, event in emitted:
            answer.emit(index, event)
        return [event async for event in answer.events()]

    return asyncio.run(run())


def test_the_last_choice_to_end_finishes_the_answer_and_tokens_add_up() -> None:
    assert events(
        (1, TokenEvent("b", "stop", 3)),
        (0, TokenEvent("a", None, 1)),
        (0, TokenEvent("", "length", 4)),
        n=2,
    ) == [
        Chunk(index=1, text="b", finish_reason="stop"),
        Chunk(index=0, text="a", finish_reason="length"),
        Finished(prompt_tokens=5, completion_tokens=7),
    ]


def test_the_byte_zero_is_replaced_and_breaks_nothing() -> None:
    assert events((0, TokenEvent("a\x00b", "stop", 1)))[0] == Chunk(
        text="a\ufffdb", finish_reason="stop"
    )


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (GenerationError("broke"), 500, "generation_failed"),
        (EngineClosedError("closed"), 503, "server_shutting_down"),
        (RequestRefusedError("no such format", "stop"), 400, "unsupported_parameter"),
    ],
)
def test_an_engine_error_becomes_one_with_a_status(
    error: EngineError, status: int, code: str
) -> None:
    with pytest.raises(TuneryError) as caught:
        events((0, TokenEvent("a", None, 1)), (0, error))
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.param == getattr(error, "param", None)


def test_an_event_after_the_loop_is_gone_is_dropped() -> None:
    async def make() -> Answer:
        return new_answer(1)

    answer = asyncio.run(make())
    answer.emit(0, TokenEvent("late", None, 1))
    assert answer.prompt_tokens == 5


def test_what_a_slow_reader_has_not_read_is_one_chunk_a_choice() -> None:
    many = [(index % 2, TokenEvent("x", None, index)) for index in range(2000)]
    ends = [(index, TokenEvent("", "stop", 1001, 4)) for index in (0, 1)]
    assert events(*many, *ends, n=2) == [
        Chunk(index=0, text="x" * 1000, finish_reason="stop"),
        Chunk(index=1, text="x" * 1000, finish_reason="stop"),
        Finished(prompt_tokens=5, completion_tokens=2002, cached_tokens=4),
    ]


def test_what_came_before_an_error_is_still_delivered() -> None:
    async def run() -> Chunk | Finished:
        answer = new_answer(1)
        answer.emit(0, TokenEvent("a", None, 1))
        answer.emit(0, GenerationError("broke"))
        events = answer.events()
        first = await anext(events)
        with pytest.raises(TuneryError):
            await anext(events)
        return first

    assert asyncio.run(run()) == Chunk(text="a")
