"""What is done once leaves no thread behind."""

import os
import threading

import pytest

from worker.threads import LEAST_URGENT, in_passing_thread


def test_the_result_comes_back_and_the_thread_is_gone() -> None:
    worker = in_passing_thread(threading.current_thread)

    assert worker is not threading.current_thread()
    assert not worker.is_alive()


def test_what_the_work_raises_is_raised_here() -> None:
    def stop() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        in_passing_thread(stop)


def test_only_the_thread_gives_way_to_others() -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)

    def own() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert in_passing_thread(own, niceness=LEAST_URGENT) == LEAST_URGENT
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine
