"""Jobs as a worker sees them: claim, heartbeat, progress, outcome.

Ownership is a lease on the database's clock plus the attempt number. Every write of a worker goes
through `fence` or carries the attempt in its condition, so that a worker which was frozen while
another took over changes nothing (specs: reliability, section 1.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, CursorResult, func, or_, select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.base import JsonObject
from models.domain.estimates import Estimate, Measured
from models.domain.status import EventLevel, JobStatus
from models.domain.training import Precision, TrainingSpec
from models.errors import LeaseLostError
from models.registry import events, quotas, turns, usage, workers
from models.registry.jobs import end_as_failed, move, to_queue
from models.registry.usage import Used, User
from models.tables import Checkpoint, Job, JobAttempt, Project

LOOKED_AT = 100
"""So many queued jobs of a project are looked at for one that can be trained beside another."""


class LastBase(NamedTuple):
    """A base model, how it is held, and the method and parameters of an adapter (`peft`)."""

    name: str
    precision: Precision
    peft: JsonObject


def claim(session: Session, worker: str, lease_seconds: float) -> Job | None:
    """Take the next queued job: that of the project whose turn it is (see ``turns``), of its jobs
    the one with the highest priority, then the oldest.

    Returns the job with its new attempt number, or None when nothing waits or the worker drains.
    """
    if workers.is_draining(session, worker):
        return None
    job = next(filter(None, (_next_of(session, project) for project in turns.order(session))), None)
    if job is None:
        return None
    return _take(session, job, worker, lease_seconds)


def claim_companions(
    session: Session,
    first: Job,
    lease_seconds: float,
    most: int,
    suits: Callable[[Session, Job], bool],
) -> list[Job]:
    """Take queued jobs of the same base model to be trained beside `first`, by its worker.

    They come in the order in which `claim` would take them. A job whose last run was lost has no
    company, so that nobody loses a run to it again.

    Args:
        session: The caller's.
        first: As `claim` returned it.
        lease_seconds: Of each.
        most: How many, at most.
        suits: Says whether such a job can be trained beside it.
    """
    assert first.lease_owner is not None
    taken: list[Job] = []
    if first.fruitless_attempts:
        return taken
    for project in turns.order(session):
        while len(taken) < most:
            job = _next_of(session, project, Job.base_model == first.base_model, suits)
            companion = job and _take(session, job, first.lease_owner, lease_seconds)
            if companion is None:
                break
            taken.append(companion)
    return taken


def _take(session: Session, job: Job, worker: str, lease_seconds: float) -> Job | None:
    """Move a queued job to a worker; None if another was quicker."""
    attempt = job.attempt + 1
    moved = move(
        session,
        job.id,
        JobStatus.RUNNING,
        Job.attempt == job.attempt,
        attempt=attempt,
        lease_owner=worker,
        lease_until=db_now() + lease_seconds,
        started_at=func.coalesce(Job.started_at, db_now()),
        checkpoint_step_at_claim=_checkpoint_step(session, job.id),
    )
    if not moved:
        return None
    session.add(JobAttempt(job_id=job.id, attempt=attempt, worker=worker, started_at=db_now()))
    message = (
        "Fine-tuning job started"
        if attempt == 1
        else f"Fine-tuning job resumed (attempt {attempt})"
    )
    events.append(session, job.id, message)
    session.refresh(job)
    return job


def _next_of(
    session: Session,
    project_id: str,
    condition: ColumnElement[bool] | None = None,
    suits: Callable[[Session, Job], bool] | None = None,
) -> Job | None:
    """Return the next queued job of a project, locked, unless as many run as it may have."""
    project = session.get_one(Project, project_id)
    if project.max_running_jobs is not None:
        # One claim at a time counts what runs, so that two never take the last place together.
        session.refresh(project, with_for_update={"key_share": True})
        if quotas.n_running(session, project_id) >= (project.max_running_jobs or 0):
            return None
    if suits is None or condition is None:
        return turns.next_job(session, project_id)
    waiting = turns.queued(project_id).where(condition, Job.fruitless_attempts == 0)
    looked_at = session.scalars(waiting.limit(LOOKED_AT))
    return next((job for job in looked_at if suits(session, job)), None)


def last_base(session: Session) -> LastBase | None:
    """Return the base model of the job that was started last, and how that job trained it."""
    job = session.scalar(
        select(Job).where(Job.started_at.is_not(None)).order_by(Job.started_at.desc()).limit(1)
    )
    if job is None:
        return None
    spec = TrainingSpec.model_validate(job.spec)
    return LastBase(job.base_model, spec.precision, spec.peft)


def has_queued(session: Session) -> bool:
    return session.scalar(select(Job.id).where(Job.status == JobStatus.QUEUED).limit(1)) is not None


def _checkpoint_step(session: Session, job_id: str) -> int:
    return session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job_id)) or 0


def _owned(job_id: str, attempt: int) -> tuple[Any, ...]:
    return (Job.id == job_id, Job.attempt == attempt, Job.status == JobStatus.RUNNING)


def fence(session: Session, job_id: str, attempt: int, **values: Any) -> None:
    """Write `values` to the job if `attempt` still owns it; keeps the row locked until the commit.

    Raises:
        LeaseLostError: the job has a newer attempt or is not running any more.
    """
    result = session.execute(
        update(Job).where(*_owned(job_id, attempt)).values(attempt=attempt, **values)
    )
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        raise LeaseLostError(f"Attempt {attempt} of job {job_id} has lost its lease.")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the owner of a running job has asked for."""

    cancel: bool
    pause: bool


def heartbeat(session: Session, job_id: str, attempt: int, lease_seconds: float) -> Wishes:
    """Renew the lease; return what the owner has asked for. Raises `LeaseLostError`."""
    found = session.execute(
        update(Job)
        .where(*_owned(job_id, attempt))
        .values(lease_until=db_now() + lease_seconds)
        .returning(Job.cancel_requested, Job.pause_requested)
    ).one_or_none()
    if found is None:
        raise LeaseLostError(f"Attempt {attempt} of job {job_id} has lost its lease.")
    return Wishes(found.cancel_requested, found.pause_requested)


def wishes(session: Session, job_id: str) -> Wishes:
    """Return what the owner has asked for, without renewing anything."""
    job = session.execute(
        select(Job.cancel_requested, Job.pause_requested).where(Job.id == job_id)
    ).one()
    return Wishes(job.cancel_requested, job.pause_requested)


def has_ended(session: Session, job_id: str, attempt: int) -> bool:
    """Say whether this attempt is the one that brought the job to its end."""
    job = session.get_one(Job, job_id)
    return job.attempt == attempt and JobStatus(job.status).is_terminal


def record_spec(session: Session, job_id: str, attempt: int, spec: TrainingSpec) -> None:
    """Store the resolved specification: what was ``"auto"`` is a number from now on."""
    fence(session, job_id, attempt, spec=spec.model_dump(mode="json"))


def record_estimate(session: Session, job_id: str, attempt: int, estimate: Estimate) -> None:
    """Store what a job is expected to take; its reservations and its end follow from it."""
    job = session.get_one(Job, job_id)
    fence(
        session,
        job_id,
        attempt,
        estimate=estimate.model_dump(mode="json"),
        reserved_tokens=estimate.total_tokens,
        reserved_device_seconds=estimate.seconds * int(job.spec.get("num_devices", 1)),
        estimated_finish=db_now() + estimate.seconds,
    )


def record_measured(session: Session, job_id: str, attempt: int, measured: Measured) -> None:
    """Note what an attempt has taken; history only, so it needs no fence."""
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.attempt == attempt)
        .values(measured=measured.model_dump(mode="json"))
    )


def record_trainer(session: Session, job_id: str, attempt: int, pid: int) -> None:
    session.execute(
        update(JobAttempt)
        .where(JobAttempt.job_id == job_id, JobAttempt.attempt == attempt)
        .values(trainer_pid=pid)
    )


def end_attempt(
    session: Session, job_id: str, attempt: int, outcome: str, exit_code: int | None
) -> None:
    """Note how an attempt ended; history only, so it needs no fence.

    The first to do so ends it: its time on devices is then counted as used, once. While jobs had a
    trainer together, each used its part of it.
    """
    this = (JobAttempt.job_id == job_id, JobAttempt.attempt == attempt)
    was_open = session.execute(
        update(JobAttempt).where(*this, JobAttempt.ended_at.is_(None)).values(ended_at=db_now())
    )
    session.execute(update(JobAttempt).where(*this).values(outcome=outcome, exit_code=exit_code))
    assert isinstance(was_open, CursorResult)
    if was_open.rowcount == 0:
        return
    job = session.get_one(Job, job_id)
    ended = session.get_one(JobAttempt, (job_id, attempt), populate_existing=True)
    seconds = _own_seconds(ended, _beside(session, ended)) * int(job.spec.get("num_devices", 1))
    user = User(job.project_id, job.key_id, job.base_model)
    usage.add(session, [(user, Used(device_seconds=seconds))])


def _beside(session: Session, ended: JobAttempt) -> list[JobAttempt]:
    """Return the attempts of other jobs that had the trainer of an ended one beside it."""
    if ended.trainer_pid is None or ended.ended_at is None:
        return []
    others = select(JobAttempt).where(
        JobAttempt.worker == ended.worker,
        JobAttempt.trainer_pid == ended.trainer_pid,
        JobAttempt.job_id != ended.job_id,
        JobAttempt.started_at < ended.ended_at,
        or_(JobAttempt.ended_at.is_(None), JobAttempt.ended_at > ended.started_at),
    )
    return list(session.scalars(others.execution_options(populate_existing=True)))


def _own_seconds(ended: JobAttempt, others: Sequence[JobAttempt]) -> float:
    """Return the seconds of an ended attempt, those divided that it had with others."""
    start, end = ended.started_at, ended.ended_at or ended.started_at
    spans = [(each.started_at, each.ended_at or end) for each in others]
    cuts = sorted({start, end, *(min(max(at, start), end) for span in spans for at in span)})
    return sum(
        (until - since) / (1 + sum(first <= since and until <= last for first, last in spans))
        for since, until in pairwise(cuts)
    )


def release(session: Session, job_id: str, attempt: int, reason: str) -> JobStatus:
    """Give up a running job at a step: to the queue, or paused if its owner asked for that.

    Args:
        session: The caller's.
        job_id: The job.
        attempt: The fencing token.
        reason: Why it goes back to the queue.

    Raises:
        LeaseLostError: the attempt does not own the job.
    """
    fence(session, job_id, attempt)
    job = session.get_one(Job, job_id, populate_existing=True)
    status = to_queue(session, job_id, pause_requested=job.pause_requested)
    if status == JobStatus.QUEUED:
        events.append(session, job_id, reason)
    return status


def succeed(session: Session, job_id: str, attempt: int, **values: Any) -> None:
    """End a job well; the caller adds the adapter row in the same transaction."""
    fence(session, job_id, attempt)
    move(session, job_id, JobStatus.SUCCEEDED, **values)
    events.append(session, job_id, f"New fine-tuned model created: {values['fine_tuned_model']}")
    events.append(session, job_id, "The job has successfully completed")


def fail(
    session: Session, job_id: str, attempt: int, code: str, message: str, param: str | None = None
) -> None:
    """End a job for a reason that another attempt would meet again; raises `LeaseLostError`."""
    fence(session, job_id, attempt)
    end_as_failed(session, job_id, code, message, param)


def finish_cancel(session: Session, job_id: str, attempt: int) -> None:
    """End a running job whose owner asked for it. Raises `LeaseLostError`."""
    fence(session, job_id, attempt)
    move(session, job_id, JobStatus.CANCELLED)
    events.append(session, job_id, "Fine-tuning job cancelled")


@dataclass(frozen=True, slots=True)
class LostRun:
    """Why a running job came back without an outcome."""

    code: str
    reason: str


def requeue(
    session: Session, job_id: str, attempt: int, lost: LostRun, max_attempts: int
) -> JobStatus:
    """Put a job whose run was lost back into the queue, or fail it.

    It fails after `max_attempts` attempts in a row that produced no new checkpoint. Raises
    `LeaseLostError` when the attempt is not the current one.
    """
    fence(session, job_id, attempt)
    job = session.get_one(Job, job_id, populate_existing=True)
    if job.cancel_requested:
        move(session, job_id, JobStatus.CANCELLED)
        events.append(session, job_id, "Fine-tuning job cancelled")
        return JobStatus.CANCELLED
    reached = _checkpoint_step(session, job_id)
    fruitless = 0 if reached > job.checkpoint_step_at_claim else job.fruitless_attempts + 1
    if fruitless >= max_attempts:
        message = (
            f"{lost.reason} The job failed after {fruitless} attempts without a new checkpoint."
        )
        end_as_failed(session, job_id, lost.code, message, None)
        return JobStatus.FAILED
    events.append(
        session,
        job_id,
        f"{lost.reason} The job continues from step {reached}.",
        level=EventLevel.WARN,
    )
    return to_queue(
        session, job_id, pause_requested=job.pause_requested, fruitless_attempts=fruitless
    )


def requeue_expired(session: Session, max_attempts: int) -> list[str]:
    """Requeue (or fail) every running job whose lease has run out; return their ids."""
    expired = session.scalars(
        select(Job)
        .where(
            Job.status == JobStatus.RUNNING,
            or_(Job.lease_until.is_(None), Job.lease_until < db_now()),
        )
        .with_for_update(skip_locked=True)
    ).all()
    lost = LostRun("worker_lost", "The worker of this job stopped answering.")
    for job in expired:
        end_attempt(session, job.id, job.attempt, "lease_expired", None)
        requeue(session, job.id, job.attempt, lost, max_attempts)
    return [job.id for job in expired]
