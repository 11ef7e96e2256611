"""What a worker does when it looks: advance jobs, take over lost ones, train."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog
from sqlalchemy.exc import SQLAlchemyError

from models.db import Database
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.errors import LeaseLostError
from models.registry import job_runs, jobs, uploads
from models.registry.job_files import DataDemand
from models.settings import WorkerSettings
from models.storage import ObjectStore
from models.tables import Job
from worker.job_log import LogKeeper
from worker.launch import Seat, TrainerProcess
from worker.training import exit_codes, objectives

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.5
WISH_SECONDS = 1.0
"""How often a worker looks whether the owner of a running job wants it to stop."""


def requeue_lost_jobs(database: Database, settings: WorkerSettings) -> int:
    """Put jobs whose worker is silent back into the queue; return how many."""
    with database.write() as session:
        lost = job_runs.requeue_expired(session, settings.max_attempts)
    for job_id in lost:
        log.warning("job_taken_from_lost_worker", job_id=job_id)
    return len(lost)


def expire_uploads(database: Database, store: ObjectStore) -> None:
    """End uploads in parts that nobody has completed in time, and delete their parts."""
    with database.write() as session:
        keys = uploads.expire(session)
    for key in keys:
        store.delete(key)


def advance_jobs(database: Database) -> int:
    """Queue (or fail) the jobs whose files are linted by now; return how many moved."""
    with database.write() as session:
        return jobs.advance_validated(session, _demand_of)


def _demand_of(spec: TrainingSpec) -> DataDemand:
    objective = objectives.get_objective(spec.objective["type"])
    return DataDemand(objective.forms, objective.closed_labels)


class TrainingRun:
    """One attempt at one job: a lease kept alive, a trainer watched, an outcome recorded.

    Args:
        job: The row as `job_runs.claim` returned it.
        trainer: A warm process that has no job yet, or the job's seat in one.
        is_stopping: Says whether this worker is shutting down.
    """

    def __init__(
        self,
        database: Database,
        settings: WorkerSettings,
        job: Job,
        trainer: TrainerProcess | Seat,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._database = database
        self._settings = settings
        self._job = job
        self._trainer = trainer
        self._is_stopping = is_stopping
        self._cancelling = False
        self._draining = False
        self._looked_at = time.monotonic()
        self._kill_at: float | None = None
        self._keeper = LogKeeper(database, job.id, job.attempt, trainer.log, settings.job_log_bytes)
        self._log = log.bind(job_id=job.id, attempt=job.attempt)

    def watch(self) -> None:
        """Run the trainer to its end and record how the attempt ended."""
        self._log.info("training_started", pid=self._trainer.pid)
        with self._database.write() as session:
            job_runs.record_trainer(session, self._job.id, self._job.attempt, self._trainer.pid)
        try:
            self._trainer.assign(self._job.id, self._job.attempt)
            exit_code = self._wait()
        except LeaseLostError:
            self._trainer.abandon()
            self._end("lease_lost", None)
            return
        except OSError:
            exit_code = self._trainer.kill()
        self._keeper.keep(at_end=True)
        outcome = self._conclude(exit_code)
        self._end(outcome, exit_code)

    def _wait(self) -> int:
        renewed = time.monotonic()
        while (exit_code := self._trainer.wait(POLL_SECONDS)) is None:
            now = time.monotonic()
            self._keeper.keep()
            if now - renewed >= self._settings.heartbeat_seconds and self._renew(now - renewed):
                renewed = now
            elif now - self._looked_at >= WISH_SECONDS:
                self._look()
            if self._is_stopping():
                self._drain()
            if self._kill_at is not None and now > self._kill_at:
                self._log.warning("trainer_did_not_stop")
                return self._trainer.kill()
        return exit_code

    def _renew(self, silent_seconds: float) -> bool:
        """Renew the lease and obey the owner; say whether the database answered.

        Past two thirds of the lease without an answer the run ends itself, since soon another
        worker may own the job.
        """
        try:
            with self._database.write() as session:
                wishes = job_runs.heartbeat(
                    session, self._job.id, self._job.attempt, self._settings.lease_seconds
                )
        except LeaseLostError:
            if not self._has_ended():
                raise
            # The trainer has just ended the job and is about to exit.
            self._kill_at = self._kill_at or time.monotonic() + self._settings.stop_seconds
            return True
        except SQLAlchemyError as error:
            self._log.warning("heartbeat_failed", error=str(error))
            if silent_seconds > self._settings.lease_seconds * 2 / 3:
                raise LeaseLostError("The database was silent for too long.") from error
            return False
        self._obey(wishes)
        return True

    def _look(self) -> None:
        """See what the owner wants; where the database is silent, the heartbeat deals with it."""
        self._looked_at = time.monotonic()
        try:
            with self._database.read() as session:
                wishes = job_runs.wishes(session, self._job.id)
        except SQLAlchemyError as error:
            self._log.warning("wishes_unknown", error=str(error))
            return
        self._obey(wishes)

    def _obey(self, wishes: job_runs.Wishes) -> None:
        if wishes.cancel and not self._cancelling:
            self._cancelling = True
            self._trainer.cancel()
            self._set_deadline()
        elif wishes.pause:
            self._drain()

    def _drain(self) -> None:
        if not self._draining:
            self._draining = True
            self._trainer.drain()
            self._set_deadline()

    def _has_ended(self) -> bool:
        with self._database.read() as session:
            return job_runs.has_ended(session, self._job.id, self._job.attempt)

    def _set_deadline(self) -> None:
        self._kill_at = time.monotonic() + self._settings.stop_seconds

    def _conclude(self, exit_code: int) -> str:
        """Move the job according to how the trainer ended; return the name of the outcome."""
        job_id, attempt = self._job.id, self._job.attempt
        try:
            with self._database.write() as session:
                if self._cancelling and exit_code not in (exit_codes.DONE, exit_codes.FAILED):
                    job_runs.finish_cancel(session, job_id, attempt)
                    return "cancelled"
                if exit_code == exit_codes.DRAINED or self._draining:
                    reason = "The job goes back to the queue"
                    if self._is_stopping():
                        reason = f"The worker is shutting down. {reason}"
                    status = job_runs.release(session, job_id, attempt, reason)
                    return "paused" if status == JobStatus.PAUSED else "released"
                lost = _reason(exit_code)
                status = job_runs.requeue(
                    session, job_id, attempt, lost, self._settings.max_attempts
                )
                return "requeued" if status == JobStatus.QUEUED else str(status)
        except LeaseLostError:
            # The trainer has ended the job itself, or another worker owns it: nothing to move.
            return {exit_codes.DONE: "succeeded", exit_codes.FAILED: "failed"}.get(
                exit_code, "lease_lost"
            )

    def _end(self, outcome: str, exit_code: int | None) -> None:
        self._log.info("training_ended", outcome=outcome, exit_code=exit_code)
        with self._database.write() as session:
            job_runs.end_attempt(session, self._job.id, self._job.attempt, outcome, exit_code)


def watch_together(runs: Sequence[TrainingRun]) -> None:
    """Watch several runs in one trainer to the end of the last."""
    with ThreadPoolExecutor(len(runs), thread_name_prefix="joint") as pool:
        for watching in [pool.submit(run.watch) for run in runs]:
            watching.result()


def _reason(exit_code: int) -> job_runs.LostRun:
    if exit_code == -9:
        return job_runs.LostRun(
            "trainer_killed", "The trainer was killed, most often for lack of memory."
        )
    if exit_code < 0:
        return job_runs.LostRun("trainer_crashed", f"The trainer crashed (signal {-exit_code}).")
    return job_runs.LostRun(
        "trainer_error", f"The trainer stopped with an error (exit status {exit_code})."
    )
