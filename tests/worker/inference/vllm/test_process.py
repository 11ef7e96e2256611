"""The process of a vLLM: it is there, it ends with all that it started, and with us."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import UnavailableError
from tests.worker.inference.engine.test_engine import wait_for
from worker.inference.vllm.process import VllmProcess

REPOSITORY = Path(__file__).parents[4]

STUBBORN = """#!/bin/sh
sleep 600 &
echo "$! is my child"
trap 'echo leaving; exit 0' TERM
echo ready
while :; do sleep 0.05; done
"""
"""Leaves a child behind when it ends."""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "vllm"
    path.write_text(STUBBORN)
    path.chmod(0o755)
    return path


def child_of(words: str) -> int:
    return int(words.split(" is my child")[0])


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_stopping_ends_the_whole_group(program: Path) -> None:
    process = VllmProcess([str(program)], os.environ)
    wait_for(lambda: "ready" in process.last_words())
    child = child_of(process.last_words())
    assert is_running(process.pid)
    assert is_running(child)
    process.stop()
    assert not process.is_alive
    assert "leaving" in process.last_words()
    wait_for(lambda: not is_running(child))
    process.stop()  # as often as one likes


def test_a_missing_program_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"VLLM_COMMAND is '.*nowhere'.*virtual environment"):
        VllmProcess([str(tmp_path / "nowhere")], os.environ)


def test_it_does_not_outlive_a_server_that_is_killed(program: Path) -> None:
    code = (
        "import os, time\n"
        "from worker.inference.vllm.process import VllmProcess\n"
        f"process = VllmProcess([{str(program)!r}], os.environ)\n"
        "while 'ready' not in process.last_words(): time.sleep(0.01)\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    with server.stdout as lines:
        pid = next(int(line) for line in lines if line.strip().isdigit())
        assert is_running(pid)
        server.kill()
        server.wait()
    try:
        wait_for(lambda: not is_running(pid))
    finally:
        os.killpg(pid, signal.SIGKILL)
