"""The trainer process: ``python -m worker.training.run``, one job and then the end.

With ``--job ID --attempt N`` it starts at once. Without, it is a warm spare: it imports the tensor
libraries (with ``--base`` loads a base model, with ``--peft`` rehearses on it), prints ``ready``
and waits on standard input for one line ``{"job_id": …, "attempt": …}``; end of file is a good end.
A list of such orders is for several jobs over one base model (`run_jobs`).

SIGTERM: finish the step, make a checkpoint, exit `DRAINED`. SIGINT: finish the step, exit
`CANCELLED`. The process dies with its parent. How it ended is its exit code: ``exit_codes``.
"""

import argparse
import gc
import json
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from io import FileIO
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import structlog

from models.db import Database
from models.domain.training import Precision
from models.logs import configure_logging
from models.processes import die_with_parent
from models.settings import Settings, load_settings
from models.storage import open_store
from worker.threads import LEAST_URGENT, in_passing_thread, set_session_niceness
from worker.training import exit_codes
from worker.training.warm import WarmBase

if TYPE_CHECKING:
    from worker.training.task import Stop

    Asked = Callable[[], Stop | None]

log = structlog.get_logger(__name__)

_SLOW_IMPORTS = ("torch", "transformers", "peft", "bitsandbytes", "worker.training.together")


class Order(NamedTuple):
    """A job, and the attempt that owns it."""

    job_id: str
    attempt: int


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


class StopLines:
    """Wishes that come as lines, each for one job; a signal counts for all of them."""

    def __init__(self, signals: StopSignal) -> None:
        self._signals = signals
        self._wanted: dict[str, str] = {}

    def read(self, lines: Iterable[bytes]) -> None:
        """Take lines until there are no more; runs in a thread of its own."""
        for line in lines:
            wish = json.loads(line)
            if self._wanted.get(wish["job_id"]) != "cancel":
                self._wanted[wish["job_id"]] = wish["stop"]

    def of(self, job_id: str) -> "Stop | None":
        from worker.training.task import Stop

        signalled, wanted = self._signals(), self._wanted.get(job_id)
        if wanted is None or signalled is Stop.CANCEL:
            return signalled
        return Stop(wanted)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.training.run", description=__doc__)
    parser.add_argument("--job", help="train this job at once")
    parser.add_argument("--attempt", type=int, help="the attempt that owns it")
    parser.add_argument("--base", help="load this base model while there is no job yet")
    parser.add_argument("--precision", help="how to hold it: a job's `precision`, as JSON")
    parser.add_argument("--peft", help="what its job will probably train: its `peft`, as JSON")
    parser.add_argument("--parent", type=int, required=True, help="process id to die with")
    given = parser.parse_args(argv)
    if (given.job is None) != (given.attempt is None):
        parser.error("--job and --attempt belong together")
    die_with_parent(given.parent)
    settings = load_settings()
    configure_logging(settings.log_level, "trainer")
    warm = WarmBase()
    if given.job is not None:
        orders = [Order(given.job, given.attempt)]
    else:
        set_session_niceness(LEAST_URGENT)
        in_passing_thread(lambda: prepare(settings, given, warm), niceness=LEAST_URGENT)
        orders = wait_for_jobs()
        set_session_niceness(0)
    if not orders:
        return exit_codes.DONE
    stop = StopSignal()
    stop.install()
    if len(orders) > 1:
        return run_jobs(settings, orders, stop, warm)
    return run_job(settings, *orders[0], stop, warm)


def prepare(settings: Settings, given: argparse.Namespace, warm: WarmBase) -> None:
    """Do what can be done before a job is known; whoever asks a model meanwhile comes first."""
    import_libraries()
    if given.base is None or has_order():
        return
    from worker.training.model import set_threads

    set_threads(settings.worker.slots)
    precision = Precision.model_validate_json(given.precision)
    peft = None if given.peft is None else json.loads(given.peft)
    warm.load(settings, given.base, precision, peft, has_order)


def input_lines() -> FileIO:
    """Return standard input without a buffer: what is not read yet is left for the next reader.

    Nor has it a lock, which a thread that waits for a line would hold at the end of the process.
    """
    return FileIO(sys.stdin.fileno(), closefd=False)


def import_libraries() -> None:
    """Import what takes seconds, and leave it out of later garbage collections.

    Half a million objects of libraries stay as long as the process does. Each full collection, of
    which there is one every few steps, would go through all of them, in one thread.
    """
    for name in _SLOW_IMPORTS:
        import_module(name)
    gc.collect()
    gc.freeze()


def has_order() -> bool:
    """Tell whether standard input has something to read already, be it its end."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def wait_for_jobs() -> list[Order]:
    """Say ``ready``, and wait for jobs; none at the end of input."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    line = input_lines().readline()
    if not line.strip():
        return []
    order = json.loads(line)
    orders = order if isinstance(order, list) else [order]
    return [Order(str(each["job_id"]), int(each["attempt"])) for each in orders]


def run_job(
    settings: Settings,
    job_id: str,
    attempt: int,
    asked: "Asked",
    warm: WarmBase | None = None,
) -> int:
    """Train one job in this process and return the exit code; nothing but `SystemExit` escapes.

    Args:
        settings: Of this process.
        job_id: The job.
        attempt: The fencing token.
        asked: Whether somebody wants the run to stop; asked before every step.
        warm: May hold the base model.
    """
    from worker.training.ending import CODES, UNEXPECTED, end_by
    from worker.training.job import JobRun, Surroundings
    from worker.training.model import set_threads

    structlog.contextvars.bind_contextvars(job_id=job_id, attempt=attempt)
    scratch = settings.worker.scratch_dir.expanduser().resolve() / f"{job_id}-a{attempt}"
    database = Database(settings.database)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        around = Surroundings(
            settings, database, open_store(settings.storage), scratch, warm or WarmBase()
        )
    except Exception:
        log.exception("trainer_failed")
        database.close()
        return UNEXPECTED
    try:
        set_threads(settings.worker.slots)
        outcome = JobRun(around, job_id, attempt).execute(asked)
        log.info("trainer_ended", outcome=outcome)
        return CODES[outcome]
    except Exception as error:
        log.exception("attempt_ended_by_error")
        return end_by(error, database, job_id, attempt)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        database.close()


def run_jobs(settings: Settings, orders: Sequence[Order], stop: StopSignal, warm: WarmBase) -> int:
    """Train several jobs over one base model; each one's end is a line on standard output.

    Wishes for a single job come in on standard input: ``{"job_id": …, "stop": "cancel"}``, or
    ``"drain"``. A signal is meant for all.
    """
    from worker.training.model import set_threads
    from worker.training.together import JobsTogether

    wishes = StopLines(stop)
    threading.Thread(target=wishes.read, args=(input_lines(),), daemon=True).start()
    set_threads(settings.worker.slots)
    database = Database(settings.database)
    try:
        JobsTogether(settings, database, orders, wishes.of, _tell_end, warm).run()
    finally:
        database.close()
    return exit_codes.DONE


def _tell_end(job_id: str, exit_code: int) -> None:
    sys.stdout.write(json.dumps({"job_id": job_id, "exit_code": exit_code}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
