"""The trainer as a process: warm spare, signals, exit codes, and its end with its parent."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from models.settings import child_environment
from tests.worker.training.killed import Killer
from tests.worker.training.service import Service
from worker.training import exit_codes
from worker.training.run import StopLines, StopSignal

COMMAND = [sys.executable, "-m", "worker.training.run"]
ROOT = Path(__file__).parents[3]
PR_SET_CHILD_SUBREAPER = 36


def environment(service: Service) -> dict[str, str]:
    settings = service.settings
    return child_environment(
        {
            "TUNERY_DATABASE__URL": settings.database.url,
            "TUNERY_STORAGE__URL": settings.storage.url,
            "TUNERY_MODELS__CACHE_DIR": str(settings.models.cache_dir),
            "TUNERY_MODELS__CATALOG": json.dumps(settings.models.catalog),
            "TUNERY_WORKER__SCRATCH_DIR": str(settings.worker.scratch_dir),
        }
    )


@pytest.fixture
def orphans() -> Iterator[None]:
    """Let this process inherit children of its children, so that it can wait for them."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


@contextmanager
def trainer(service: Service, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "--parent", str(os.getpid()), *arguments],
        cwd=ROOT,
        env=environment(service),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def parent(service: Service, code: str) -> subprocess.Popen[str]:
    """Start a process that runs `code`, which prints the process id of a trainer of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(service),
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_warm_spare_trains_the_job_it_is_given(service: Service) -> None:
    with trainer(service) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        job = service.submit()
        process.stdin.write(json.dumps({"job_id": job.id, "attempt": job.attempt}) + "\n")
        process.stdin.flush()
        assert process.wait(60) == exit_codes.DONE
    assert service.job(job.id).status == "succeeded"
    assert len(service.adapters()) == 1


def test_a_warm_spare_that_is_not_needed_ends_well(service: Service) -> None:
    with trainer(service) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == exit_codes.DONE


@pytest.mark.parametrize(
    ("number", "code", "n_checkpoints"),
    [
        (signal.SIGTERM, exit_codes.DRAINED, 1),
        (signal.SIGINT, exit_codes.CANCELLED, 0),
    ],
)
def test_a_signal_ends_the_run_at_a_step(
    service: Service, number: signal.Signals, code: int, n_checkpoints: int
) -> None:
    job = service.submit(
        hyperparameters={"n_epochs": 50, "batch_size": 1}, checkpoint_steps=100_000
    )
    with trainer(service, "--job", job.id, "--attempt", str(job.attempt)) as process:
        wait_until(lambda: service.job(job.id).step > 0)
        process.send_signal(number)
        assert process.wait(60) == code
    steps = [row.step for row in service.checkpoints(job.id)]
    assert len(steps) == n_checkpoints
    assert service.job(job.id).step < 600
    if steps:
        assert steps[0] == service.trace(job.id)[-1].step == service.job(job.id).step


def test_the_process_dies_with_its_parent(service: Service) -> None:
    code = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-m', 'worker.training.run', '--parent', str(os.getpid())]\n"
        "child = subprocess.Popen(command,\n"
        "    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with parent(service, code) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10)


def test_a_process_whose_parent_ended_before_it_could_look_does_not_wait_for_work(
    service: Service, orphans: None
) -> None:
    code = (
        "import os, signal\n"
        "from worker.launch import TrainerProcess\n"
        "child = TrainerProcess()\n"
        "os.kill(child.pid, signal.SIGSTOP)\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    with parent(service, code) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
    os.kill(child, signal.SIGCONT)
    _, status, usage = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert usage.ru_maxrss < 150_000, "it loaded torch first (kB)"


def test_a_process_whose_parent_is_gone_does_not_start(service: Service) -> None:
    with trainer(service, "--parent", str(os.getppid())) as process:
        assert process.wait(30) == 1


def test_an_attempt_that_does_not_own_the_job_is_told_so(service: Service) -> None:
    job = service.submit()
    with trainer(service, "--job", job.id, "--attempt", "7") as process:
        assert process.wait(60) == exit_codes.LEASE_LOST
    assert service.job(job.id).status == "running"


def test_cancelling_wins_over_draining() -> None:
    stop = StopSignal()
    assert stop() is None
    stop._on_signal(signal.SIGTERM, None)
    assert stop() == "drain"
    stop._on_signal(signal.SIGINT, None)
    assert stop() == "cancel"
    stop._on_signal(signal.SIGTERM, None)
    assert stop() == "cancel"


def test_a_wish_is_for_one_job_and_a_signal_for_all() -> None:
    signals = StopSignal()
    wishes = StopLines(signals)
    lines = [("one", "cancel"), ("one", "drain"), ("two", "drain")]
    wishes.read(json.dumps({"job_id": job, "stop": wish}).encode() for job, wish in lines)
    assert [wishes.of(job) for job in ("one", "two", "three")] == ["cancel", "drain", None]
    signals._on_signal(signal.SIGTERM, None)
    assert wishes.of("three") == "drain"
    assert wishes.of("one") == "cancel"


def test_twenty_kills_cost_only_time(service: Service) -> None:
    killer = Killer(service.settings, seed=20)
    changes: dict[str, Any] = {
        "checkpoint_steps": 1,
        "hyperparameters": {"n_epochs": 50, "batch_size": 2},
    }
    undisturbed = service.submit(**changes)
    assert killer.run(undisturbed.id, undisturbed.attempt) == exit_codes.DONE
    job = service.submit(**changes)
    n_kills = 0
    codes = []
    while n_kills < 20:
        if n_kills % 2:
            code = killer.kill_in_a_save(job.id, job.attempt)
        else:
            code = killer.kill_at_a_moment(job.id, job.attempt, most_seconds=1.5)
        codes.append(code)
        if code == exit_codes.DONE:
            break
        assert code == -signal.SIGKILL
        n_kills += 1
        job = service.requeue(job, max_attempts=100)
    assert n_kills == 20, f"the job ended before all kills were made: {codes}"
    assert killer.run(job.id, job.attempt) == exit_codes.DONE
    digests = {row.job_id: row.digest for row in service.adapters()}
    assert digests[job.id] == digests[undisturbed.id]
    losses = {
        each: [point.train_loss for point in service.trace(each)]
        for each in (job.id, undisturbed.id)
    }
    assert losses[job.id] == losses[undisturbed.id]
    assert len(losses[job.id]) == 300
