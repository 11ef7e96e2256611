"""The trainer process: ``python -m worker.training.run``, one job and then the end.

With ``--job ID --attempt N`` it starts at once. Without, it is a warm spare: it imports the tensor
libraries, prints ``ready`` and waits on standard input for one line
``{"job_id": …, "attempt": …}``; end of file is a good end.

SIGTERM: finish the step, make a checkpoint, exit `DRAINED`. SIGINT: finish the step, exit
`CANCELLED`. The process dies with its parent. How it ended is its exit code: ``exit_codes``.
"""

import argparse
import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING

import structlog

from models.db import Database
from models.errors import LeaseLostError, TrainingFailedError, TuneryError, UnavailableError
from models.logs import configure_logging
from models.processes import die_with_parent
from models.registry import job_runs
from models.settings import Settings, load_settings
from models.storage import open_store
from worker.training import exit_codes

if TYPE_CHECKING:
    from worker.training.job import Surroundings
    from worker.training.task import Stop

    Asked = Callable[[], Stop | None]

log = structlog.get_logger(__name__)

_SLOW_IMPORTS = ("torch", "transformers", "peft", "bitsandbytes", "worker.training.job")
_UNEXPECTED = 1


class StopSignal:
    """SIGTERM and SIGINT as a question that the loop asks between steps; cancelling wins."""

    def __init__(self) -> None:
        self._term = self._int = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._int = True
        else:
            self._term = True

    def __call__(self) -> "Stop | None":
        from worker.training.task import Stop

        if self._int:
            return Stop.CANCEL
        return Stop.DRAIN if self._term else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.training.run", description=__doc__)
    parser.add_argument("--job", help="train this job at once")
    parser.add_argument("--attempt", type=int, help="the attempt that owns it")
    parser.add_argument("--parent", type=int, help="process id to die with; the caller's if absent")
    given = parser.parse_args(argv)
    if (given.job is None) != (given.attempt is None):
        parser.error("--job and --attempt belong together")
    die_with_parent(given.parent or os.getppid())
    settings = load_settings()
    configure_logging(settings.log_level, "trainer")
    job = (given.job, given.attempt) if given.job is not None else wait_for_job()
    if job is None:
        return exit_codes.DONE
    stop = StopSignal()
    stop.install()
    job_id, attempt = job
    return run_job(settings, job_id, attempt, stop)


def wait_for_job() -> tuple[str, int] | None:
    """Import what takes seconds, say ``ready``, and wait for a job; None at the end of input."""
    for name in _SLOW_IMPORTS:
        import_module(name)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line.strip():
        return None
    order = json.loads(line)
    return str(order["job_id"]), int(order["attempt"])


def run_job(settings: Settings, job_id: str, attempt: int, asked: "Asked") -> int:
    """Train one job in this process and return the exit code; nothing but `SystemExit` escapes.

    Args:
        settings: Of this process.
        job_id: The job.
        attempt: The fencing token.
        asked: Whether somebody wants the run to stop; asked before every step.
    """
    from worker.training.job import Surroundings

    structlog.contextvars.bind_contextvars(job_id=job_id, attempt=attempt)
    scratch = settings.worker.scratch_dir.expanduser().resolve() / f"{job_id}-a{attempt}"
    database = Database(settings.database)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        store = open_store(settings.storage)
        return _attempt(Surroundings(settings, database, store, scratch), job_id, attempt, asked)
    except LeaseLostError as error:
        log.warning("lease_lost", error=error.message)
        return exit_codes.LEASE_LOST
    except Exception:
        log.exception("trainer_failed")
        return _UNEXPECTED
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        database.close()


def _attempt(around: "Surroundings", job_id: str, attempt: int, asked: "Asked") -> int:
    from worker.training.job import JobRun
    from worker.training.model import set_threads
    from worker.training.task import Outcome

    set_threads(around.settings.worker.slots)
    try:
        outcome = JobRun(around, job_id, attempt).execute(asked)
    except LeaseLostError:
        raise
    except Exception as error:
        failure = failure_of(error)
        if failure is None:
            raise
        log.error("job_failed", code=failure.code, error=failure.message, exc_info=error)
        with around.database.write() as session:
            job_runs.fail(session, job_id, attempt, failure.code, failure.message, failure.param)
        return exit_codes.FAILED
    log.info("trainer_ended", outcome=outcome)
    return {
        Outcome.FINISHED: exit_codes.DONE,
        Outcome.DRAINED: exit_codes.DRAINED,
        Outcome.CANCELLED: exit_codes.CANCELLED,
    }[outcome]


def failure_of(error: Exception) -> TuneryError | None:
    """Return what ends the job for good, or None where another attempt may do better."""
    if isinstance(error, UnavailableError) and error.code == "object_store_unavailable":
        return None
    if isinstance(error, TuneryError):
        return error
    from worker.training.memory import is_out_of_memory

    if is_out_of_memory(error):
        return TrainingFailedError(
            "The worker ran out of memory. Lower max_seq_length or peft.r, or use a worker with "
            "more memory.",
            code="out_of_memory",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainingFailedError(
            "A disk of the worker is full. Free some space and start the job again.",
            code="storage_full",
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
