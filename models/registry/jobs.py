"""Jobs as their owner sees them: create, find, cancel. The worker's side is ``job_runs``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, CursorResult, or_, select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.base import JsonObject
from models.domain.status import EventLevel, JobStatus, sources_of
from models.domain.training import TrainingSpec
from models.domain.webhooks import job_event
from models.errors import InvalidRequestError, NotFoundError
from models.prepared import PreparedInsert, PreparedQuery, row_of
from models.registry import events, job_files, usage, webhooks
from models.registry.job_files import DataDemand
from models.registry.page import Cursor, Page, page
from models.registry.quotas import NOTHING, Reservation
from models.registry.usage import Used, User
from models.tables import Job, ordered_id

_insert = PreparedInsert(Job, given=["created_at"])
_now = PreparedQuery(select(db_now()))


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be added, with the key that it was asked for with and what it reserves."""

    project_id: str
    spec: TrainingSpec
    metadata: JsonObject | None = None
    key_id: str | None = None
    reserved: Reservation = NOTHING
    id: str = field(default_factory=lambda: ordered_id("ftjob-"))

    def row(self, created_at: object) -> JsonObject:
        return {
            "id": self.id,
            "created_at": created_at,
            "project_id": self.project_id,
            "key_id": self.key_id,
            "base_model": self.spec.model,
            "training_file": self.spec.training_file,
            "validation_file": self.spec.validation_file,
            "spec": self.spec.model_dump(mode="json"),
            "request_metadata": self.metadata,
            "priority": self.spec.priority,
            "reserved_tokens": self.reserved.tokens,
            "reserved_device_seconds": self.reserved.device_seconds,
        }

    def first_events(self) -> tuple[str, ...]:
        names = f"training file: {self.spec.training_file}"
        if self.spec.validation_file:
            names += f" and validation file: {self.spec.validation_file}"
        return f"Created fine-tuning job: {self.id}", f"Validating {names}"


def create(
    session: Session,
    project_id: str,
    spec: TrainingSpec,
    metadata: JsonObject | None,
    key_id: str | None = None,
    reserved: Reservation = NOTHING,
) -> Job:
    """Add one job; see `add`."""
    return add(session, [NewJob(project_id, spec, metadata, key_id, reserved)])[0]


def add(session: Session, new: Sequence[NewJob]) -> list[Job]:
    """Add jobs in state ``validating_files``; a worker moves each on once its files are linted.

    What is returned is only to be read.
    """
    ((now,),) = _now.fetch(session)
    rows = [_insert.whole(each.row(now)) for each in new]
    _insert.add(session, *rows)
    events.begin(session, {each.id: each.first_events() for each in new})
    return [row_of(Job, row) for row in rows]


def get(session: Session, project_id: str, job_id: str) -> Job:
    """Return a job of this project, or raise `NotFoundError` as for an id that never existed."""
    job = session.get(Job, job_id)
    if job is None or job.project_id != project_id:
        raise not_found(job_id)
    return job


def not_found(job_id: str) -> NotFoundError:
    """Return the error for a job that does not exist, or that belongs to another project."""
    return NotFoundError(
        f"Could not find fine-tuning job: {job_id!r}.",
        param="fine_tuning_job_id",
        code="fine_tuning_job_not_found",
    )


def has_ended(job: Job) -> bool:
    return JobStatus(job.status).is_terminal


SortJobs = Literal["created_at", "base_model", "status"]


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs are wanted: in a status, with metadata that holds all pairs, with a text.

    `text` is looked for in the id, the suffix, and the names of the base and of the result.
    """

    status: JobStatus | None = None
    text: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    without_metadata: bool = False


def list_page(
    session: Session,
    project_id: str,
    cursor: Cursor,
    wanted: JobFilter = JobFilter(),
    sort: SortJobs = "created_at",
) -> Page[Job]:
    """Return jobs, newest first unless `sort` or the cursor's order says otherwise."""
    query = select(Job).where(Job.project_id == project_id)
    if wanted.status is not None:
        query = query.where(Job.status == wanted.status)
    if wanted.text:
        places = (Job.id, Job.spec["suffix"].as_string(), Job.base_model, Job.fine_tuned_model)
        query = query.where(
            or_(*(place.icontains(wanted.text, autoescape=True) for place in places))
        )
    for key, value in wanted.metadata.items():
        query = query.where(Job.request_metadata[key].as_string() == value)
    if wanted.without_metadata:
        query = query.where(Job.request_metadata.is_(None))
    return page(session, query, Job, (getattr(Job, sort), Job.id), cursor)


def move(
    session: Session,
    job_id: str,
    target: JobStatus,
    *conditions: ColumnElement[bool],
    **values: Any,
) -> bool:
    """Change a job's status if the moves allow it and `conditions` hold; say whether it happened.

    This is the only place that writes ``jobs.status``. What a job has trained counts as used when
    it ends.
    """
    if target.is_terminal:
        values |= {
            "finished_at": db_now(),
            "lease_owner": None,
            "lease_until": None,
            "estimated_finish": None,
            "reserved_tokens": 0,
            "reserved_device_seconds": 0.0,
        }
    result = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(sources_of(target)), *conditions)
        .values(status=target, **values)
    )
    assert isinstance(result, CursorResult)
    moved = result.rowcount == 1
    if moved and target.is_terminal:
        job = session.get_one(Job, job_id, populate_existing=True)
        if job.trained_tokens:
            user = User(job.project_id, job.key_id, job.base_model)
            usage.add(session, [(user, Used(trained_tokens=job.trained_tokens))])
        if (event := job_event(target)) is not None:
            webhooks.emit(session, job.project_id, event, job_id)
    return moved


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Cancel a waiting job at once; ask the worker of a running one to stop at its next step.

    Raises:
        NotFoundError: no such job.
        InvalidRequestError: it has ended, or is being cancelled already.
    """
    job = get(session, project_id, job_id)
    session.refresh(job, with_for_update=True)
    if JobStatus(job.status).is_terminal:
        raise InvalidRequestError(
            f"Job {job_id} has already ended with status '{job.status}'; it cannot be cancelled.",
            param="fine_tuning_job_id",
            code="job_not_cancellable",
        )
    if job.cancel_requested:
        raise InvalidRequestError(
            f"Job {job_id} is being cancelled already.",
            param="fine_tuning_job_id",
            code="job_not_cancellable",
        )
    if job.status == JobStatus.RUNNING:
        session.execute(update(Job).where(Job.id == job_id).values(cancel_requested=True))
        events.append(session, job_id, "Cancellation requested; the job stops at its next step")
    else:
        move(session, job_id, JobStatus.CANCELLED, cancel_requested=True)
        events.append(session, job_id, "Fine-tuning job cancelled")
    session.refresh(job)
    return job


def pause(session: Session, project_id: str, job_id: str) -> Job:
    """Pause a queued job at once; have the worker of a running one save a checkpoint and stop.

    A job whose files are still being checked is paused as soon as they are.

    Raises:
        NotFoundError: no such job.
        InvalidRequestError: it has ended, is paused already, or is being cancelled.
    """
    job = get(session, project_id, job_id)
    session.refresh(job, with_for_update=True)
    status = JobStatus(job.status)
    if status.is_terminal or status == JobStatus.PAUSED or job.cancel_requested:
        what = "is being cancelled" if job.cancel_requested else f"has status '{status}'"
        raise InvalidRequestError(
            f"Job {job_id} {what}; it cannot be paused.",
            param="fine_tuning_job_id",
            code="job_not_pausable",
        )
    if status == JobStatus.QUEUED:
        to_queue(session, job_id, pause_requested=True)
    elif not job.pause_requested:
        session.execute(update(Job).where(Job.id == job_id).values(pause_requested=True))
        when = "at its next step" if status == JobStatus.RUNNING else "once its files are checked"
        events.append(session, job_id, f"Pause requested; the job pauses {when}")
    session.refresh(job)
    return job


def resume(session: Session, project_id: str, job_id: str) -> Job:
    """Put a paused job back into the queue; withdraw a pause that has not happened yet.

    Raises:
        NotFoundError: no such job.
        InvalidRequestError: it is not paused.
    """
    job = get(session, project_id, job_id)
    session.refresh(job, with_for_update=True)
    if job.status == JobStatus.PAUSED:
        move(session, job_id, JobStatus.QUEUED)
        events.append(session, job_id, "Fine-tuning job resumed; it waits in the queue")
    elif job.pause_requested and not JobStatus(job.status).is_terminal:
        session.execute(update(Job).where(Job.id == job_id).values(pause_requested=False))
        events.append(session, job_id, "The request to pause was withdrawn")
    else:
        raise InvalidRequestError(
            f"Job {job_id} has status '{job.status}'; only a paused job can be resumed.",
            param="fine_tuning_job_id",
            code="job_not_resumable",
        )
    session.refresh(job)
    return job


def to_queue(session: Session, job_id: str, *, pause_requested: bool, **values: Any) -> JobStatus:
    """Move a job to ``queued``, or to ``paused`` if its owner wants it to wait; say which."""
    target = JobStatus.PAUSED if pause_requested else JobStatus.QUEUED
    move(
        session, job_id, target, pause_requested=False, lease_owner=None, lease_until=None, **values
    )
    if target == JobStatus.PAUSED:
        events.append(session, job_id, "Fine-tuning job paused")
    return target


def advance_validated(session: Session, demand_of: Callable[[TrainingSpec], DataDemand]) -> int:
    """Move every job whose files are linted to ``queued`` or ``failed``; return how many.

    Args:
        demand_of: Says what a job's objective asks of its files.
    """
    waiting = session.scalars(
        select(Job)
        .where(Job.status == JobStatus.VALIDATING_FILES)
        .order_by(Job.created_at)
        .with_for_update(skip_locked=True)
    ).all()
    n_moved = 0
    for job in waiting:
        spec = TrainingSpec.model_validate(job.spec)
        verdict = job_files.judge(session, spec, demand_of(spec))
        if verdict is None:
            continue
        if isinstance(verdict, job_files.Problem):
            end_as_failed(session, job.id, verdict.code, verdict.message, verdict.param)
        else:
            events.append(session, job.id, "Files validated, moving job to queued state")
            to_queue(session, job.id, pause_requested=job.pause_requested)
        n_moved += 1
    return n_moved


def end_as_failed(
    session: Session,
    job_id: str,
    code: str,
    message: str,
    param: str | None,
    *conditions: ColumnElement[bool],
) -> bool:
    """Move a job to ``failed`` with its error and the event that says so."""
    moved = move(
        session,
        job_id,
        JobStatus.FAILED,
        *conditions,
        error_code=code,
        error_message=message,
        error_param=param,
    )
    if moved:
        events.append(session, job_id, message, level=EventLevel.ERROR)
    return moved
