"""Adapters that come, go and are replaced while many streams decode: no answer is ever another's.

``TUNERY_TEST_CHURN_SECONDS`` makes the storm longer than the few seconds of the suite; with ``make
churn`` it rages for a minute and tells what it saw.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest

from tests.worker.inference.test_own_model import write_adapter
from tests.worker.inference.tiny import (
    ADAPTER_BYTES,
    Files,
    byte_engine,
    generate,
    shapes_of,
    tiny_llama,
)
from worker.inference.engine.blocks import root_of
from worker.inference.engine.engine import BatchingEngine, Request, Ticket
from worker.inference.engine.errors import AdapterInUseError, AdapterPoolFullError, EngineError
from worker.inference.engine.params import Sampling, TokenEvent
from worker.inference.engine.scheduler import Limits

# peft 0.21.2 reads an attribute that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SECONDS = float(os.environ.get("TUNERY_TEST_CHURN_SECONDS", "5"))
N_STREAMS = 64
N_ADAPTERS = 14
OTHERS: list[dict[str, Any]] = [
    {"type": "houlsby", "r": 4},
    {"type": "meft", "r": 4, "lambda_bits": 3},
    {"type": "adamix", "r": 4, "experts": 2},
    {"type": "ia3"},
]
"""The first adapters; all others are LoRA."""
GREEDY = Sampling(10, temperature=0)
PROMPTS = [(*tuple(1 + i * 7 % 255 for i in range(64)), end) for end in (3, 4)] + [(9, 8, 7)]
TIGHT = Limits(
    max_running=64, n_slots=4, cache_tokens=8192, row_growth=32, prefix_tokens=640, step_tokens=96
)
"""Places for all streams, but slots are fought for and prefixes forgotten."""

Who = str | None
Case = tuple[Who, int]


@dataclass
class Storm:
    """What a storm of requests saw."""

    n_answers: int = 0
    n_aborted: int = 0
    wrong: list[Case] = field(default_factory=list)
    growth_bytes: int = 0


class Stream:
    """One request, whose events arrive by themselves."""

    def __init__(self, case: Case, done: "SimpleQueue[Stream]") -> None:
        self.case = case
        self.text = ""
        self.error: EngineError | None = None
        self.ticket: Ticket | None = None
        self._done = done

    def emit(self, index: int, event: TokenEvent | EngineError) -> None:
        if isinstance(event, EngineError):
            self.error = event
            self._done.put(self)
            return
        self.text += event.text
        if event.finish_reason is not None:
            self._done.put(self)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("churn")
    shapes = shapes_of(tiny_llama())
    for seed in range(N_ADAPTERS):
        if seed < len(OTHERS):
            write_adapter(folder / str(seed), OTHERS[seed], seed)
        else:
            Files(shapes, seed=seed, size=0.4).write(folder / str(seed))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[Case, str]:
    """What every adapter says to every prompt when it is alone and nothing is stored."""
    engine = byte_engine(limits=Limits(prefix_tokens=0))
    answers: dict[Case, str] = {}
    for who in (None, *map(str, range(N_ADAPTERS))):
        lease = None if who is None else engine.load(who, folder / who)
        for number, prompt in enumerate(PROMPTS):
            answers[who, number] = generate(engine, Request(prompt, GREEDY, lease=lease))[0]
        if lease is not None:
            lease.release()
    engine.close()
    return answers


@pytest.fixture
def engine() -> Iterator[BatchingEngine]:
    engine = byte_engine(limits=replace(TIGHT, adapter_bytes=8 * ADAPTER_BYTES))
    yield engine
    engine.close()


def send(
    engine: BatchingEngine, folder: Path, case: Case, done: "SimpleQueue[Stream]"
) -> Stream | None:
    """Ask, after loading the adapter where it is not in memory; None: there was no room for it."""
    who, number = case
    try:
        lease = None if who is None else engine.acquire(who) or engine.load(who, folder / who)
    except AdapterPoolFullError:
        return None
    stream = Stream(case, done)
    request = Request(PROMPTS[number], GREEDY, lease=lease)
    stream.ticket = engine.submit(request, stream.emit)
    if lease is not None:
        lease.release()
    return stream


def rage(engine: BatchingEngine, folder: Path, expected: dict[Case, str], seconds: float) -> Storm:
    """Keep `N_STREAMS` requests open for `seconds`; a name may mean another adapter at any time."""
    draw, storm, process = random.Random(5), Storm(), psutil.Process()
    aliases = {f"name-{i}": str(i) for i in range(N_ADAPTERS // 2)}
    done: SimpleQueue[Stream] = SimpleQueue()
    open_streams: set[Stream] = set()
    started, settled = time.monotonic(), 0
    while time.monotonic() < started + seconds or open_streams:
        if time.monotonic() >= started + seconds / 3 and not settled:
            settled = process.memory_info().rss
        while len(open_streams) < N_STREAMS and time.monotonic() < started + seconds:
            alias = draw.choice([None, *aliases])
            if alias is not None and draw.random() < 0.1:
                aliases[alias] = str(draw.randrange(N_ADAPTERS))  # published anew
            case = (None if alias is None else aliases[alias], draw.randrange(len(PROMPTS)))
            if (stream := send(engine, folder, case, done)) is None:
                break
            open_streams.add(stream)
            if draw.random() < 0.1 and stream.ticket is not None:
                stream.ticket.abort()
                open_streams.discard(stream)
                storm.n_aborted += 1
        if draw.random() < 0.2:
            with contextlib.suppress(AdapterInUseError):
                engine.unload(str(draw.randrange(N_ADAPTERS)))
        stream = done.get(timeout=60)
        if stream not in open_streams:
            continue  # it was aborted too late to be stopped
        open_streams.discard(stream)
        assert stream.error is None, stream.error
        storm.n_answers += 1
        if stream.text != expected[stream.case]:
            storm.wrong.append(stream.case)
    storm.growth_bytes = process.memory_info().rss - settled
    return storm


def test_no_answer_is_wrong_and_nothing_is_left_behind(
    engine: BatchingEngine, folder: Path, expected: dict[Case, str]
) -> None:
    assert len({expected[who, 0] for who, _ in expected}) == N_ADAPTERS + 1
    storm = rage(engine, folder, expected, SECONDS)
    assert storm.wrong == []
    assert storm.n_answers > N_STREAMS
    assert storm.n_aborted > 0
    deadline = time.monotonic() + 30
    while engine.stats().running + engine.stats().waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = engine.stats()
    assert set(stats.references.values()) <= {0}
    assert engine.audit() == {}
    assert stats.host_evictions > 0
    assert stats.slot_evictions > 0
    assert stats.n_cached > 0
    assert stats.adapter_bytes <= 8 * ADAPTER_BYTES
    assert storm.growth_bytes < 64 * 1024**2
    print(  # noqa: T201 (what `make churn` is for)
        f"{SECONDS:.0f} s, {N_STREAMS} streams: {storm.n_answers} answers, "
        f"{len(storm.wrong)} wrong, {storm.n_aborted} aborted; "
        f"{stats.host_evictions} evictions from memory, "
        f"{stats.slot_evictions} from slots, {stats.preemptions} preemptions; "
        f"{stats.n_cached} of {stats.n_prompt} prompt tokens stored; "
        f"{storm.growth_bytes / 2**20:.1f} MiB more after two thirds"
    )


def test_the_storm_finds_out_when_the_adapter_is_not_in_the_root_of_prefixes(
    engine: BatchingEngine,
    folder: Path,
    expected: dict[Case, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "worker.inference.engine.runner.root_of", lambda base, adapter: root_of(base, None)
    )
    assert rage(engine, folder, expected, min(SECONDS, 3)).wrong
