"""From the engine's events to the wire's."""

import asyncio

import pytest

from models.domain.generation import Chunk, Finished
from models.errors import TuneryError
from worker.inference.answer import Answer
from worker.inference.engine.errors import EngineClosedError, EngineError, GenerationError
from worker.inference.engine.params import TokenEvent


def events(*emitted: tuple[int, TokenEvent | EngineError], n: int = 1) -> list[Chunk | Finished]:
    async def run() -> list[Chunk | Finished]:
        answer = Answer(n=n, prompt_tokens=5, system_fingerprint="fp")
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
        Chunk(index=0, text="a"),
        Chunk(index=0, text="", finish_reason="length"),
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
    ],
)
def test_an_engine_error_becomes_one_with_a_status(
    error: EngineError, status: int, code: str
) -> None:
    with pytest.raises(TuneryError) as caught:
        events((0, TokenEvent("a", None, 1)), (0, error))
    assert (caught.value.status_code, caught.value.code) == (status, code)


def test_an_event_after_the_loop_is_gone_is_dropped() -> None:
    async def make() -> Answer:
        return Answer(n=1, prompt_tokens=1, system_fingerprint="fp")

    answer = asyncio.run(make())
    answer.emit(0, TokenEvent("late", None, 1))
    assert answer.prompt_tokens == 1
