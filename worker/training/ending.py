"""What an error or an outcome means for the attempt that met it: its exit code, its job's end."""

import errno

import structlog

from models.db import Database
from models.errors import LeaseLostError, TrainingFailedError, TuneryError, UnavailableError
from models.registry import job_runs
from worker.training import exit_codes
from worker.training.task import Outcome

log = structlog.get_logger(__name__)

UNEXPECTED = 1
CODES = {
    Outcome.FINISHED: exit_codes.DONE,
    Outcome.DRAINED: exit_codes.DRAINED,
    Outcome.CANCELLED: exit_codes.CANCELLED,
}


def end_by(error: Exception, database: Database, job_id: str, attempt: int) -> int:
    """Fail the job if another attempt would meet `error` again; return the exit code.

    Args:
        error: What ended the attempt.
        database: Where the job's row is.
        job_id: The job.
        attempt: The fencing token.
    """
    if isinstance(error, LeaseLostError):
        log.warning("lease_lost", job_id=job_id, error=error.message)
        return exit_codes.LEASE_LOST
    failure = failure_of(error)
    if failure is None:
        log.error("trainer_failed", job_id=job_id, error=str(error))
        return UNEXPECTED
    log.error("job_failed", job_id=job_id, code=failure.code, error=failure.message)
    try:
        with database.write() as session:
            job_runs.fail(session, job_id, attempt, failure.code, failure.message, failure.param)
    except LeaseLostError as lost:
        log.warning("lease_lost", job_id=job_id, error=lost.message)
        return exit_codes.LEASE_LOST
    except Exception:
        log.exception("trainer_failed", job_id=job_id)
        return UNEXPECTED
    return exit_codes.FAILED


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
