"""A follower: ``python -m worker.training.follow``, one of the further devices of a job.

It prepares the job as its trainer does, takes its share of every step, and writes nothing: no row,
no object, no checkpoint. It stops when rank 0 does and dies with it.
"""

import argparse
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from models.db import Database
from models.errors import LeaseLostError, TuneryError
from models.logs import configure_logging
from models.processes import die_with_parent
from models.settings import load_settings
from models.storage import open_store
from worker.base_models import pick_device
from worker.training import checkpoint, exit_codes
from worker.training.job import JobRun, Surroundings
from worker.training.loop import Trainer
from worker.training.model import set_threads
from worker.training.ranks import Ranks, device_of
from worker.training.report import Silence

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a follower stands: see `Ranks.join`."""

    rank: int
    size: int
    meeting: Path


def follow(around: Surroundings, job_id: str, attempt: int, place: _Place) -> None:
    """Take part in a job until rank 0 ends it.

    Raises:
        LeaseLostError: another attempt owns the job.
        TuneryError: the job cannot end well.
        RuntimeError: rank 0 or another follower is gone.
    """
    reporter = Silence()
    run = JobRun(around, job_id, attempt, reporter)
    device = device_of(pick_device("auto"), place.rank)
    task = run.prepare(run.read(), device)
    ranks = Ranks.join(place.meeting, place.rank, place.size, device)
    trainer = Trainer(task, ranks=ranks)
    state = ranks.copy_path(None)
    if state is not None:
        checkpoint.restore(trainer, state)
    ranks.copy_parameters(trainer.parameters.values())
    trainer.run(reporter, lambda trainer, point: None, ranks.agree(lambda: None))
    ranks.leave()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.training.follow", description=__doc__)
    parser.add_argument("--job", required=True, help="the job")
    parser.add_argument("--attempt", type=int, required=True, help="the attempt that owns it")
    parser.add_argument("--rank", type=int, required=True, help="number of this process, from 1")
    parser.add_argument("--size", type=int, required=True, help="number of processes")
    parser.add_argument("--meeting", type=Path, required=True, help="file by which they meet")
    parser.add_argument("--parent", type=int, required=True, help="process id of rank 0")
    given = parser.parse_args(argv)
    die_with_parent(given.parent)
    # Rank 0 is told to stop, and tells the others.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = load_settings()
    configure_logging(settings.log_level, "follower")
    structlog.contextvars.bind_contextvars(job_id=given.job, rank=given.rank)
    set_threads(settings.worker.slots * given.size)
    scratch = given.meeting.parent / f"rank-{given.rank}"
    scratch.mkdir()
    database = Database(settings.database)
    around = Surroundings(settings, database, open_store(settings.storage), scratch)
    try:
        follow(around, given.job, given.attempt, _Place(given.rank, given.size, given.meeting))
    except LeaseLostError:
        return exit_codes.LEASE_LOST
    except TuneryError as error:
        # Rank 0 comes to the same error and records it.
        log.warning("follower_ended", error=error.message)
        return exit_codes.FAILED
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        database.close()
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
