"""Adapters in memory: reference counts and eviction."""

import random
from threading import Thread

import pytest
import torch

from worker.inference.engine.errors import (
    AdapterFormatError,
    AdapterInUseError,
    AdapterPoolFullError,
)
from worker.inference.engine.pool import AdapterPool
from worker.inference.engine.weights import AdapterWeights, ModuleChange


def adapter(name: str, n_bytes: int = 8) -> AdapterWeights:
    """An adapter of so many bytes (a multiple of 4)."""
    return AdapterWeights(name, {"x": ModuleChange(gain=torch.ones(n_bytes // 4))})


def admit(pool: AdapterPool, name: str, n_bytes: int = 8) -> None:
    pool.admit(adapter(name, n_bytes)).release()


def test_the_least_recently_used_idle_adapter_makes_room() -> None:
    pool = AdapterPool(16)
    admit(pool, "a")
    admit(pool, "b")
    lease = pool.acquire("a")
    assert lease is not None
    lease.release()
    admit(pool, "c")
    assert set(pool.references()) == {"a", "c"}


def test_an_adapter_in_use_is_never_evicted() -> None:
    pool = AdapterPool(8)
    with pool.admit(adapter("a")):
        with pytest.raises(AdapterPoolFullError):
            pool.admit(adapter("b"))
        assert pool.references() == {"a": 1}
    admit(pool, "b")
    assert pool.references() == {"b": 0}


def test_a_lease_is_given_back_once_however_often_it_is_released() -> None:
    pool = AdapterPool(8)
    first = pool.admit(adapter("a"))
    second = first.share()
    first.release()
    first.release()
    assert pool.references() == {"a": 1}
    second.release()
    assert pool.references() == {"a": 0}


def test_a_released_lease_cannot_be_shared() -> None:
    lease = AdapterPool(8).admit(adapter("a"))
    lease.release()
    with pytest.raises(ValueError, match="released"):
        lease.share()


def test_admitting_what_is_resident_keeps_the_resident_copy() -> None:
    pool = AdapterPool(8)
    resident = adapter("a")
    with pool.admit(resident), pool.admit(adapter("a")) as lease:
        assert lease.weights is resident
        assert pool.references() == {"a": 2}


def test_counts_return_to_zero_after_many_threads() -> None:
    pool = AdapterPool(24)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            name = draw.choice("abcde")
            try:
                lease = pool.acquire(name) or pool.admit(adapter(name))
            except AdapterPoolFullError:
                continue
            with lease, lease.share() as other:
                assert other.weights.digest == name

    threads = [Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pool.references()) == 3
    assert set(pool.references().values()) == {0}


def test_as_many_idle_adapters_go_as_their_bytes_are_needed() -> None:
    pool = AdapterPool(24)
    for name in "abc":
        admit(pool, name)
    admit(pool, "large", 16)
    assert set(pool.references()) == {"c", "large"}
    assert (pool.n_bytes, pool.evictions) == (24, 2)


def test_nothing_is_evicted_for_an_adapter_that_would_not_fit_all_the_same() -> None:
    pool = AdapterPool(16)
    admit(pool, "idle")
    with pool.admit(adapter("busy")), pytest.raises(AdapterPoolFullError, match="8 of 16 bytes"):
        pool.admit(adapter("large", 16))
    assert set(pool.references()) == {"idle", "busy"}


def test_an_adapter_larger_than_the_pool_is_refused_for_good() -> None:
    with pytest.raises(AdapterFormatError, match="too_large"):
        AdapterPool(8).admit(adapter("a", 12))


def test_removing_frees_the_bytes_once_and_never_what_is_in_use() -> None:
    pool = AdapterPool(16)
    with pool.admit(adapter("a")), pytest.raises(AdapterInUseError):
        pool.remove("a")
    assert pool.remove("a") == 8
    assert pool.remove("a") == 0
    assert pool.n_bytes == 0
