"""A vLLM engine over the fake server, and adapters for its tiny model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker.inference.tiny import END, Files, byte_engine, decode_bytes, shapes_of, tiny_llama
from tests.worker.inference.vllm.fake import KEY, FakeVllm
from worker.inference.engine.scheduler import Limits
from worker.inference.vllm.adapters import Links
from worker.inference.vllm.client import VllmClient
from worker.inference.vllm.engine import Server, VllmEngine, VllmLimits

LIMITS = VllmLimits(n_adapters=2, max_rank=8, max_running=4, max_waiting=4, watch_seconds=0.02)

MakeAdapter = Callable[..., Path]


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    fake = FakeVllm(byte_engine(limits=Limits(n_slots=4, max_running=16)), max_rank=LIMITS.max_rank)
    yield fake
    fake.stop()


@pytest.fixture
def engine(fake: FakeVllm, tmp_path: Path) -> Iterator[VllmEngine]:
    engine = connect(fake, tmp_path / "cache")
    yield engine
    engine.close()


def connect(fake: FakeVllm, cache: Path, **client: Any) -> VllmEngine:
    server = Server(fake, VllmClient(fake.url, KEY, **client), Links(cache))
    return VllmEngine(server, shapes_of(tiny_llama()), decode_bytes, [END], LIMITS)


@pytest.fixture
def adapter(tmp_path: Path) -> MakeAdapter:
    """Writes the files of an adapter below the cache's file system."""

    def write(seed: int, r: int = 4, **config: Any) -> Path:
        files = Files(shapes_of(tiny_llama()), seed=seed, r=r, size=0.4)
        files.config |= config
        return files.write(tmp_path / f"adapter-{seed}")

    return write
