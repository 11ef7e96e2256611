"""The engine: answers in turn are the answers alone, and one failure stays one failure."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.inference.tiny import (
    ADAPTER_BYTES,
    END,
    Events,
    Files,
    byte_engine,
    collect,
    decode_bytes,
    generate,
    shapes_of,
    submit,
    tiny_llama,
)
from worker.inference.engine import engine as engine_module
from worker.inference.engine.adapters import StoredAdapter, read_adapter
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.errors import (
    AdapterFormatError,
    AdapterPoolFullError,
    EngineClosedError,
    EngineError,
    EngineFullError,
    GenerationError,
)
from worker.inference.engine.params import ModuleShape, Sampling, TokenEvent
from worker.inference.engine.runner import cache_argument
from worker.inference.engine.scheduler import Limits

POISON = 13
"""A prompt token at which a spoiled model raises."""

PROMPT = (72, 101, 108, 108, 111)
GREEDY = Sampling(max_tokens=24, temperature=0)


@pytest.fixture
def engine() -> Iterator[BatchingEngine]:
    engine = byte_engine(
        limits=Limits(n_slots=2, max_running=3, max_waiting=3, adapter_bytes=2 * ADAPTER_BYTES)
    )
    yield engine
    engine.close()


def adapter(directory: Path, seed: int) -> Path:
    return Files(shapes_of(tiny_llama()), seed=seed, size=0.4).write(directory / str(seed))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def is_idle(engine: BatchingEngine) -> bool:
    stats = engine.stats()
    return stats.running + stats.waiting == 0 and not any(stats.references.values())


class Slow:
    """Makes every forward pass of a model take a while."""

    def __init__(self, engine: BatchingEngine, seconds: float = 0.01) -> None:
        engine._model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_greedy_text_is_that_of_the_librarys_own_generate(engine: BatchingEngine) -> None:
    reference = (
        tiny_llama()
        .generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, pad_token_id=END)[
            0, len(PROMPT) :
        ]
        .tolist()
    )
    expected = decode_bytes([token for token in reference if token != END]).rstrip("\ufffd")
    text, last = generate(engine, Request(PROMPT, GREEDY))
    assert text == expected
    assert last.n_tokens == len(reference)


def test_answers_side_by_side_are_the_answers_alone(engine: BatchingEngine, tmp_path: Path) -> None:
    leases = [engine.load(str(seed), adapter(tmp_path, seed)) for seed in (1, 2)]
    requests = [
        Request((*PROMPT, extra), GREEDY, lease=lease)
        for lease in (None, *leases)
        for extra in (1, 2)
    ]
    alone = [generate(engine, request) for request in requests]
    assert len({text for text, _ in alone}) == len(requests)
    for _ in range(3):
        streams = [submit(engine, request) for request in requests]
        assert [collect(stream) for stream in streams] == alone
    for lease in leases:
        lease.release()
    wait_for(lambda: is_idle(engine))


def test_streams_proceed_together(engine: BatchingEngine) -> None:
    Slow(engine)
    order: list[int] = []

    def note(name: int) -> Callable[[int, TokenEvent | EngineError], None]:
        return lambda index, event: order.append(name)

    for name in (0, 1):
        engine.submit(Request((*PROMPT, name), Sampling(24, temperature=0)), note(name))
    wait_for(lambda: is_idle(engine))
    first_end = order.index(1) if order[0] == 0 else order.index(0)
    assert first_end < len(order) / 2


def test_a_prompt_longer_than_a_chunk_gives_the_same_text() -> None:
    prompt = tuple(1 + index * 7 % 255 for index in range(Limits().step_tokens + 100))
    reference = (
        tiny_llama()
        .generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=END)[
            0, len(prompt) :
        ]
        .tolist()
    )
    engine = byte_engine()
    text, _ = generate(engine, Request(prompt, Sampling(8, temperature=0)))
    engine.close()
    assert text == decode_bytes([token for token in reference if token != END]).rstrip("\ufffd")


def test_end_token_stops_and_is_no_text() -> None:
    model = tiny_llama()
    first = int(model(input_ids=torch.tensor([PROMPT])).logits[0, -1].argmax())
    engine = BatchingEngine(model, decode_bytes, [first])
    assert generate(engine, Request(PROMPT, GREEDY)) == ("", TokenEvent("", "stop", 1))
    engine.close()


def test_max_tokens_stops_with_length(engine: BatchingEngine) -> None:
    _, last = generate(engine, Request(PROMPT, Sampling(3, temperature=0)))
    assert (last.finish_reason, last.n_tokens) == ("length", 3)


def test_stop_string_ends_the_text_before_it(engine: BatchingEngine) -> None:
    whole, _ = generate(engine, Request(PROMPT, GREEDY))
    stop = whole[4:6]
    text, last = generate(engine, Request(PROMPT, Sampling(24, temperature=0, stop=(stop,))))
    assert text == whole[: whole.index(stop)]
    assert last.finish_reason == "stop"


def test_same_seed_gives_the_same_text_and_choices_have_seeds_of_their_own(
    engine: BatchingEngine,
) -> None:
    def texts(seed: int, n: int) -> list[str]:
        events = submit(engine, Request(PROMPT, Sampling(12, seed=seed), n=n))
        texts, left = [""] * n, n
        while left:
            index, event = events.get(timeout=30)
            assert isinstance(event, TokenEvent)
            texts[index] += event.text
            left -= event.finish_reason is not None
        return texts

    three = texts(5, 3)
    assert len(set(three)) == 3
    assert texts(5, 3) == three
    assert texts(6, 2) == three[1:]


def test_prompts_of_like_lengths_share_a_pass_and_get_the_answers_of_each_alone(
    tmp_path: Path,
) -> None:
    """Twice: the second time most of each prompt is stored, so that the pass goes on from it."""
    prompts = [tuple(range(first, first + 20 + first % 3)) for first in (10, 50, 90, 130)]
    long = tuple(range(100))

    def answers(model: Any, *, at_once: bool) -> list[list[str]]:
        engine = byte_engine(model)
        lease = engine.load("1", adapter(tmp_path, 1))
        requests = [
            Request(each, GREEDY, lease=lease if number % 2 else None)
            for number, each in enumerate([*prompts, long])
        ]
        found = []
        for _ in range(2):
            if at_once:
                with engine._changed:  # nothing is fed before all are there
                    streams = [submit(engine, request) for request in requests]
                found.append([collect(stream)[0] for stream in streams])
            else:
                found.append([generate(engine, request)[0] for request in requests])
        engine.close()
        return found

    expected = answers(tiny_llama(), at_once=False)
    passes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passes.append(tuple(kwargs["input_ids"].shape))

    model = tiny_llama()
    model.register_forward_pre_hook(note, with_kwargs=True)
    assert answers(model, at_once=True) == expected
    prompts_fed = [shape for shape in passes if shape[1] > 1]
    # 22 tokens at most, of which 16 are stored the second time; of the long one 96.
    assert prompts_fed == [(4, 22), (1, 100), (4, 6), (1, 4)]


def test_one_broken_sequence_leaves_the_others_alive(
    engine: BatchingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if POISON in kwargs["input_ids"].flatten().tolist():
            raise RuntimeError("secret detail")

    alone, _ = generate(engine, Request(PROMPT, GREEDY))
    engine._model.register_forward_pre_hook(spoil, with_kwargs=True)
    good, bad = (submit(engine, Request(p, GREEDY)) for p in (PROMPT, (*PROMPT, POISON)))
    with caplog.at_level(logging.ERROR), pytest.raises(GenerationError, match="RuntimeError"):
        collect(bad)
    assert "secret detail" in caplog.text
    assert collect(good)[0] == alone
    assert engine.stats().alive
    wait_for(lambda: is_idle(engine))


def test_a_receiver_that_raises_ends_its_own_sequence_only(
    engine: BatchingEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(index: int, event: object) -> None:
        raise OSError("nobody is listening")

    with engine.load("1", adapter(tmp_path, 1)) as lease:
        engine.submit(Request(PROMPT, Sampling(10_000), lease=lease), refuse)
    wait_for(lambda: is_idle(engine))
    assert "nobody is listening" in caplog.text
    assert generate(engine, Request(PROMPT, GREEDY))[1].n_tokens > 0


def test_a_batch_that_breaks_costs_only_the_sequence_that_breaks_it(
    engine: BatchingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [Request((*PROMPT, extra), GREEDY) for extra in (1, 2)]
    alone = [generate(engine, request) for request in requests]
    victim = len(PROMPT) + 5

    def spoil(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if positions is not None and victim + 20 in positions[:, 0].tolist():
            raise RuntimeError("secret detail")

    engine._model.register_forward_pre_hook(spoil, with_kwargs=True)
    bad = submit(engine, Request(tuple(range(1, victim + 19)), Sampling(200, temperature=0)))
    good = [submit(engine, request) for request in requests]
    with pytest.raises(GenerationError, match="RuntimeError"):
        collect(bad)
    assert [collect(stream) for stream in good] == alone
    wait_for(lambda: is_idle(engine))


@pytest.mark.parametrize("when", ["waiting", "first", "streaming"])
def test_abort_at_any_stage_frees_the_sequence_and_its_adapter(
    engine: BatchingEngine, tmp_path: Path, when: str
) -> None:
    Slow(engine, 0.003)
    endless = Sampling(100_000, seed=1)
    blockers = []
    if when == "waiting":
        blockers = [engine.submit(Request(PROMPT, endless), lambda *_: None) for _ in range(3)]
    events = Events()
    with engine.load("1", adapter(tmp_path, 1)) as lease:
        ticket = engine.submit(
            Request(PROMPT, endless, n=2, lease=lease), lambda *event: events.put(event)
        )
    assert engine.stats().references == {"1": 2}
    if when == "streaming":
        events.get(timeout=30)
    ticket.abort()
    ticket.abort()
    wait_for(lambda: engine.stats().references == {"1": 0})
    for blocker in blockers:
        blocker.abort()
    wait_for(lambda: is_idle(engine))


def test_the_engine_says_when_it_is_full_and_takes_no_part_of_a_request(
    engine: BatchingEngine, tmp_path: Path
) -> None:
    Slow(engine)
    with engine.load("1", adapter(tmp_path, 1)) as lease:
        tickets = [
            engine.submit(Request(PROMPT, Sampling(100_000, seed=1)), lambda *_: None)
            for _ in range(5)
        ]
        with pytest.raises(EngineFullError):
            engine.submit(Request(PROMPT, GREEDY, n=2, lease=lease), lambda *_: None)
        assert engine.stats().references == {"1": 1}
    for ticket in tickets:
        ticket.abort()
    wait_for(lambda: is_idle(engine))
    generate(engine, Request(PROMPT, GREEDY, n=1))


def test_an_adapter_in_use_keeps_its_place_and_an_idle_one_makes_room(
    engine: BatchingEngine, tmp_path: Path
) -> None:
    first = engine.load("1", adapter(tmp_path, 1))
    second = engine.load("2", adapter(tmp_path, 2))
    with pytest.raises(AdapterPoolFullError):
        engine.load("3", adapter(tmp_path, 3))
    second.release()
    engine.load("3", adapter(tmp_path, 3)).release()
    assert set(engine.stats().references) == {"1", "3"}
    assert engine.acquire("2") is None
    first.release()


def test_a_bad_adapter_is_refused_and_takes_no_place(
    engine: BatchingEngine, tmp_path: Path
) -> None:
    directory = adapter(tmp_path, 1)
    (directory / "adapter_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(AdapterFormatError):
        engine.load("1", directory)
    assert engine.stats().references == {}


def test_an_adapter_is_read_in_a_thread_that_leaves_no_pool_behind(
    engine: BatchingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = []

    def read(directory: Path, digest: str, shapes: Mapping[str, ModuleShape]) -> StoredAdapter:
        readers.append(threading.current_thread())
        return read_adapter(directory, digest, shapes)

    monkeypatch.setattr(engine_module, "read_adapter", read)
    engine.load("1", adapter(tmp_path, 1)).release()
    assert [reader.is_alive() for reader in readers] == [False]


def test_adapters_that_come_and_go_do_not_change_a_running_answer(
    engine: BatchingEngine, tmp_path: Path
) -> None:
    request = Request(PROMPT, Sampling(60, temperature=0))
    with engine.load("1", adapter(tmp_path, 1)) as lease:
        request = Request(PROMPT, Sampling(60, temperature=0), lease=lease)
        alone = generate(engine, request)
        running = submit(engine, request)
        for seed in range(2, 8):
            with engine.load(str(seed), adapter(tmp_path, seed)) as other:
                generate(engine, Request(PROMPT, Sampling(2, temperature=0), lease=other))
        assert collect(running) == alone


def test_closing_ends_every_sequence_with_an_error_and_takes_no_more(tmp_path: Path) -> None:
    engine = byte_engine(limits=Limits(max_running=1))
    Slow(engine)
    with engine.load("1", adapter(tmp_path, 1)) as lease:
        request = Request(PROMPT, Sampling(100_000, seed=1), lease=lease)
        streams = [submit(engine, request) for _ in range(2)]
    engine.close()
    for stream in streams:
        with pytest.raises(EngineClosedError):
            collect(stream)
    assert engine.stats().references == {"1": 0}
    assert not engine.stats().alive
    with pytest.raises(EngineClosedError):
        engine.submit(request, lambda *_: None)


def test_an_empty_prompt_is_refused(engine: BatchingEngine) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        engine.submit(Request((), GREEDY), lambda *_: None)


def test_the_cache_goes_under_the_name_that_the_model_knows() -> None:
    class Renamed(torch.nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any = None, **_: Any) -> None: ...

    class Without(torch.nn.Module):
        def forward(self, input_ids: Any, **_: Any) -> None: ...

    renamed: Any = Renamed()
    without: Any = Without()
    assert cache_argument(tiny_llama()) in ("cache", "past_key_values")
    assert cache_argument(renamed) == "past_key_values"
    with pytest.raises(ValueError, match="no key-value cache"):
        cache_argument(without)
