"""Adapters on their way into memory: once for all, side by side, and not for ever."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.domain.generation import AdapterRef
from models.errors import CapacityError, ConflictError, UnavailableError, UnprocessableError
from models.storage import LocalStore
from tests.worker.inference.tiny import (
    ADAPTER_BYTES,
    Files,
    decode_bytes,
    publish,
    shapes_of,
    tiny_llama,
)
from worker.base_models import BaseModelInfo
from worker.inference.adapter_store import AdapterStore
from worker.inference.engine.engine import BatchingEngine
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.scheduler import Limits
from worker.inference.residency import Residency

SHAPES = shapes_of(tiny_llama())
TEMPLATE = "e" * 64


class CountingEngine(BatchingEngine):
    """Counts loads, and takes its time over them."""

    loads = 0
    seconds = 0.0

    def load(self, digest: str, directory: Path) -> AdapterLease:
        self.loads += 1
        time.sleep(self.seconds)
        return super().load(digest, directory)


class Parts:
    def __init__(self, store: LocalStore, base: BaseModelInfo, root: Path) -> None:
        self.engine = CountingEngine(
            tiny_llama(), decode_bytes, [], limits=Limits(adapter_bytes=ADAPTER_BYTES)
        )
        self.store, self.base, self.root = store, base, root
        self.adapters = AdapterStore(store, root / "cache", base)
        self.residency = Residency(self.engine, self.adapters, TEMPLATE, load_seconds=0.5)

    def publish(self, seed: int, template: str = TEMPLATE) -> AdapterRef:
        directory = Files(SHAPES, seed=seed).write(self.root / str(seed))
        return publish(self.store, directory, self.base, template_sha256=template)


@pytest.fixture
def parts(store: LocalStore, base: BaseModelInfo, tmp_path: Path) -> Iterator[Parts]:
    parts = Parts(store, base, tmp_path)
    yield parts
    parts.residency.close()
    parts.engine.close()


def test_all_who_wait_share_one_load_and_get_a_lease_each(parts: Parts) -> None:
    ref = parts.publish(1)

    async def ask() -> list[AdapterLease]:
        return await asyncio.gather(*(parts.residency.acquire(ref) for _ in range(20)))

    leases = asyncio.run(ask())
    assert parts.engine.loads == 1
    assert parts.engine.stats().references == {ref.digest: 20}
    for lease in leases:
        lease.release()
    assert parts.engine.stats().references == {ref.digest: 0}


def test_a_slow_load_is_told_to_wait_and_serves_the_next_who_asks(parts: Parts) -> None:
    ref = parts.publish(1)
    parts.engine.seconds = 0.8

    async def ask() -> None:
        with pytest.raises(UnavailableError) as caught:
            await parts.residency.acquire(ref)
        assert (caught.value.code, caught.value.retry_after) == ("adapter_loading", 5)
        (await parts.residency.acquire(ref)).release()

    asyncio.run(ask())
    assert parts.engine.loads == 1


def test_a_full_pool_is_a_matter_of_capacity(parts: Parts) -> None:
    first, second = parts.publish(1), parts.publish(2)

    async def ask() -> None:
        with await parts.residency.acquire(first):
            with pytest.raises(CapacityError) as caught:
                await parts.residency.acquire(second)
            assert caught.value.retry_after == 2
        (await parts.residency.acquire(second)).release()

    asyncio.run(ask())
    assert set(parts.engine.stats().references) == {second.digest}


def test_an_adapter_that_breaks_a_rule_is_refused_with_the_reason(parts: Parts) -> None:
    files = Files(SHAPES)
    files.config["lora_bias"] = True
    directory = files.write(parts.root / "biased")
    ref = publish(parts.store, directory, parts.base, template_sha256=TEMPLATE)
    with pytest.raises(UnprocessableError, match=r"unsupported_feature.*lora_bias") as caught:
        asyncio.run(parts.residency.acquire(ref))
    assert caught.value.code == "invalid_adapter"


def test_an_adapter_trained_with_another_chat_template_is_refused(parts: Parts) -> None:
    ref = parts.publish(1, template="f" * 64)
    with pytest.raises(ConflictError) as caught:
        asyncio.run(parts.residency.acquire(ref))
    assert caught.value.code == "wrong_chat_template"


def test_after_closing_nothing_is_loaded(parts: Parts) -> None:
    parts.residency.close()
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(parts.residency.acquire(parts.publish(1)))
    assert caught.value.code == "server_shutting_down"
