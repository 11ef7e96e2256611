"""Attempts at a job in processes that are killed, at any moment or inside a write to the store."""

import multiprocessing
import os
import random
import signal
from typing import Any

from models.settings import Settings
from models.storage import LocalStore
from worker.training.run import run_job

_SLOW = ["torch", "transformers", "peft", "bitsandbytes", "worker.training.job"]


class Killer:
    """Starts attempts from a process that has imported everything, and kills them."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self._settings = settings.model_dump(mode="json")
        self._draw = random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*_SLOW, __name__])

    def run(self, job_id: str, attempt: int) -> int:
        """Run an attempt to its end; return the exit code."""
        return self._start(job_id, attempt, 0, None)

    def kill_in_a_save(self, job_id: str, attempt: int) -> int:
        """Kill an attempt before or after one of its first writes to the store."""
        return self._start(job_id, attempt, self._draw.randint(1, 12), None)

    def kill_at_a_moment(self, job_id: str, attempt: int, most_seconds: float) -> int:
        return self._start(job_id, attempt, 0, self._draw.uniform(0.05, most_seconds))

    def _start(self, job_id: str, attempt: int, fatal_write: int, seconds: float | None) -> int:
        process = self._context.Process(
            target=_attempt, args=(self._settings, job_id, attempt, fatal_write)
        )
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return process.exitcode


def _attempt(settings: dict[str, Any], job_id: str, attempt: int, fatal_write: int) -> None:
    if fatal_write:
        _die_at_write(fatal_write)
    code = run_job(Settings.model_validate(settings), job_id, attempt, lambda: None)
    os._exit(code)


def _die_at_write(number: int) -> None:
    """Let the process die at its n-th write: by turns before it and right after it."""
    put = LocalStore.put
    n_writes = 0

    def deadly(self: LocalStore, *args: Any, **kwargs: Any) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes == number and number % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, *args, **kwargs)
        if n_writes == number:
            os.kill(os.getpid(), signal.SIGKILL)

    LocalStore.put = deadly  # type: ignore[method-assign]
