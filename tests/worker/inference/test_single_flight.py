"""Work that many ask for is done once."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest

from models.errors import NotFoundError
from worker.inference.single_flight import SingleFlight


def test_all_who_ask_at_once_get_the_one_result() -> None:
    calls: list[int] = []
    together = Barrier(20)
    flight: SingleFlight[int] = SingleFlight()

    def work() -> int:
        calls.append(1)
        time.sleep(0.2)
        return 42

    def ask() -> int:
        together.wait()
        return flight.run("key", work)

    with ThreadPoolExecutor(20) as pool:
        results = [future.result() for future in [pool.submit(ask) for _ in range(20)]]
    assert results == [42] * 20
    assert len(calls) == 1


def test_keys_do_not_wait_for_each_other() -> None:
    flight: SingleFlight[str] = SingleFlight()
    blocked = Event()

    def block() -> str:
        assert blocked.wait(30)
        return "slow"

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(flight.run, "a", block)
        assert flight.run("b", lambda: "fast") == "fast"
        blocked.set()
        assert slow.result() == "slow"


def test_a_known_failure_is_remembered_for_its_key_and_then_tried_again() -> None:
    calls: list[int] = []
    flight: SingleFlight[None] = SingleFlight(failure_seconds=0.3)

    def fail() -> None:
        calls.append(1)
        raise NotFoundError("no such thing", code="model_not_found")

    for _ in range(5):
        with pytest.raises(NotFoundError, match="no such thing") as caught:
            flight.run("key", fail)
        assert caught.value.code == "model_not_found"
    assert len(calls) == 1
    flight.run("other", lambda: None)
    time.sleep(0.35)
    with pytest.raises(NotFoundError):
        flight.run("key", fail)
    assert len(calls) == 2


def test_a_bug_is_raised_and_not_remembered() -> None:
    flight: SingleFlight[int] = SingleFlight()
    with pytest.raises(ZeroDivisionError):
        flight.run("key", lambda: 1 // 0)
    assert flight.run("key", lambda: 1) == 1
