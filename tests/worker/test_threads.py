"""What is done once leaves no thread behind."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from worker.threads import LEAST_URGENT, in_passing_thread, set_session_niceness


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


AUTOGROUP = Path("/proc/self/autogroup")
TOLD = """
from pathlib import Path
from worker.threads import set_session_niceness
for niceness in (19, 0):
    set_session_niceness(niceness)
    print(Path("/proc/self/autogroup").read_text().split()[-1])
"""


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel does not group by session")
def test_a_session_gives_way_and_takes_it_back() -> None:
    command = [sys.executable, "-c", TOLD]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, start_new_session=True
    )
    assert done.stdout.split() == ["19", "0"]


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel does not group by session")
def test_the_session_of_somebody_else_is_left_alone() -> None:
    code = "from worker.threads import set_session_niceness as s; s(19)"
    before = AUTOGROUP.read_text()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert AUTOGROUP.read_text() == before
    if os.getsid(0) != os.getpid():
        set_session_niceness(LEAST_URGENT)
        assert AUTOGROUP.read_text() == before
