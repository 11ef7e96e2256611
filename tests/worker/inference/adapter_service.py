"""Everything between a reference to an adapter and its answer, of a tiny model, without HTTP."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.domain.generation import AdapterRef
from models.storage import LocalStore
from tests.worker.inference.tiny import (
    ADAPTER_BYTES,
    Files,
    collect,
    publish,
    shapes_of,
    submit,
    tiny_llama,
)
from worker.base_models import BaseModelInfo
from worker.inference.adapter_store import AdapterStore
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.params import Sampling
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.scheduler import Limits
from worker.inference.residency import Residency

PROMPT = tuple(1 + index * 7 % 255 for index in range(70))
GREEDY = Sampling(12, temperature=0)
TWO_SLOTS = Limits(n_slots=2)
SHAPES = shapes_of(tiny_llama())


def spell(ids: Sequence[int]) -> str:
    """A vocabulary in which every token is one character."""
    return "".join(chr(256 + token) for token in ids)


class CountingStore(LocalStore):
    """Counts what is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []

    def get(self, key: str) -> bytes:
        self.reads.append(key)
        return super().get(key)

    def stream(self, key: str) -> Iterator[bytes]:
        self.reads.append(key)
        return super().stream(key)


class AdapterService:
    """A store, its disk and memory tiers, and an engine with slots."""

    def __init__(
        self, root: Path, base: BaseModelInfo, *, limits: Limits = TWO_SLOTS, n_resident: int = 4
    ) -> None:
        self.root, self.base = root, base
        self.store = CountingStore(root / "objects")
        self.model = tiny_llama()
        self.engine = BatchingEngine(
            self.model,
            spell,
            [],
            fingerprint=base.fingerprint,
            limits=replace(limits, adapter_bytes=n_resident * ADAPTER_BYTES),
        )
        self.adapters = AdapterStore(self.store, root / "cache", base)
        self.residency = Residency(self.engine, self.adapters, "")

    def publish(self, seed: int, *, files: Files | None = None, **changes: Any) -> AdapterRef:
        files = files or Files(SHAPES, seed=seed, size=0.4)
        directory = files.write(self.root / f"published-{seed}")
        ref = publish(self.store, directory, self.base, **changes)
        return ref.model_copy(update={"name": "ft:tiny:same-name"})

    def acquire(self, ref: AdapterRef) -> AdapterLease:
        return asyncio.run(self.residency.acquire(ref))

    def ask(self, ref: AdapterRef | None, prompt: tuple[int, ...] = PROMPT) -> str:
        """Return the greedy answer; raises what admitting it raises."""
        if ref is None:
            return collect(submit(self.engine, Request(prompt, GREEDY)))[0]
        with self.acquire(ref) as lease:
            return collect(submit(self.engine, Request(prompt, GREEDY, lease=lease)))[0]

    def ask_all(self, refs: list[AdapterRef | None]) -> list[str]:
        """Ask all at the same time, on one loop like a server."""

        async def acquire(ref: AdapterRef | None) -> AdapterLease | None:
            return None if ref is None else await self.residency.acquire(ref)

        async def acquire_all() -> list[AdapterLease | None]:
            return await asyncio.gather(*(acquire(ref) for ref in refs))

        leases = asyncio.run(acquire_all())
        streams = [submit(self.engine, Request(PROMPT, GREEDY, lease=lease)) for lease in leases]
        for lease in leases:
            if lease is not None:
                lease.release()
        return [collect(stream)[0] for stream in streams]

    def slow_down(self, seconds: float = 0.005) -> None:
        self.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.engine.stats().running + self.engine.stats().waiting == 0)
        wait_for(lambda: not any(self.engine.stats().references.values()))

    def close(self) -> None:
        self.residency.close()
        self.engine.close()


@contextmanager
def adapter_service(root: Path, base: BaseModelInfo, **options: Any) -> Iterator[AdapterService]:
    service = AdapterService(root, base, **options)
    try:
        yield service
    finally:
        service.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)
