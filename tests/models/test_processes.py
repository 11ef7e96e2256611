"""A child ends with its parent, however the parent ends."""

import subprocess
import sys
import time

import psutil
import pytest

CHILD = """
import os, sys, time
from models.processes import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep(60)
"""


def test_a_killed_parent_takes_its_child_along() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.01)


@pytest.mark.parametrize("parent", [1, 2**22])
def test_a_child_whose_parent_is_another_process_exits_at_once(parent: int) -> None:
    child = subprocess.run([sys.executable, "-c", CHILD, str(parent)], timeout=30, check=False)
    assert child.returncode == 1
