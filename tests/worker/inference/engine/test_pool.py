"""Adapters in memory: reference counts and eviction."""

import random
from threading import Thread

import pytest

from worker.inference.engine.errors import AdapterPoolFullError
from worker.inference.engine.params import AdapterWeights
from worker.inference.engine.pool import AdapterPool


def admit(pool: AdapterPool, name: str) -> None:
    pool.admit(AdapterWeights(name, {})).release()


def test_the_least_recently_used_idle_adapter_makes_room() -> None:
    pool = AdapterPool(2)
    admit(pool, "a")
    admit(pool, "b")
    lease = pool.acquire("a")
    assert lease is not None
    lease.release()
    admit(pool, "c")
    assert set(pool.references()) == {"a", "c"}


def test_an_adapter_in_use_is_never_evicted() -> None:
    pool = AdapterPool(1)
    with pool.admit(AdapterWeights("a", {})):
        with pytest.raises(AdapterPoolFullError):
            pool.admit(AdapterWeights("b", {}))
        assert pool.references() == {"a": 1}
    admit(pool, "b")
    assert pool.references() == {"b": 0}


def test_a_lease_is_given_back_once_however_often_it_is_released() -> None:
    pool = AdapterPool(1)
    first = pool.admit(AdapterWeights("a", {}))
    second = first.share()
    first.release()
    first.release()
    assert pool.references() == {"a": 1}
    second.release()
    assert pool.references() == {"a": 0}


def test_a_released_lease_cannot_be_shared() -> None:
    lease = AdapterPool(1).admit(AdapterWeights("a", {}))
    lease.release()
    with pytest.raises(ValueError, match="released"):
        lease.share()


def test_admitting_what_is_resident_keeps_the_resident_copy() -> None:
    pool = AdapterPool(1)
    resident = AdapterWeights("a", {})
    with pool.admit(resident), pool.admit(AdapterWeights("a", {})) as lease:
        assert lease.weights is resident
        assert pool.references() == {"a": 2}


def test_counts_return_to_zero_after_many_threads() -> None:
    pool = AdapterPool(3)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            name = draw.choice("abcde")
            try:
                lease = pool.acquire(name) or pool.admit(AdapterWeights(name, {}))
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
