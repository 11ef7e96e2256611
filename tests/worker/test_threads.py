"""What is done once leaves no thread behind."""

import threading

import pytest

from worker.threads import in_passing_thread


def test_the_result_comes_back_and_the_thread_is_gone() -> None:
    worker = in_passing_thread(threading.current_thread)

    assert worker is not threading.current_thread()
    assert not worker.is_alive()


def test_what_the_work_raises_is_raised_here() -> None:
    def stop() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        in_passing_thread(stop)
