"""Jobs as their owner sees them: create, find, cancel. The worker's side is ``job_runs``."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.base import JsonObject
from models.domain.reports import DatasetReport
from models.domain.status import EventLevel, FileStatus, JobStatus, sources_of
from models.domain.training import TrainingSpec
from models.errors import InvalidRequestError, NotFoundError
from models.registry import events
from models.registry.page import Cursor, Page, page
from models.tables import File, Job, new_id


def create(
    session: Session, project_id: str, spec: TrainingSpec, metadata: JsonObject | None
) -> Job:
    """Add a job in state ``validating_files``; a worker moves it on once its files are linted."""
    job = Job(
        id=new_id("ftjob-"),
        project_id=project_id,
        base_model=spec.model,
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        spec=spec.model_dump(mode="json"),
        request_metadata=metadata,
        priority=spec.priority,
    )
    session.add(job)
    session.flush()
    events.append(session, job.id, f"Created fine-tuning job: {job.id}")
    names = f"training file: {spec.training_file}"
    if spec.validation_file:
        names += f" and validation file: {spec.validation_file}"
    events.append(session, job.id, f"Validating {names}")
    return job


def get(session: Session, project_id: str, job_id: str) -> Job:
    """Return a job of this project, or raise `NotFoundError` as for an id that never existed."""
    job = session.scalar(select(Job).where(Job.id == job_id, Job.project_id == project_id))
    if job is None:
        raise NotFoundError(
            f"Could not find fine-tuning job: {job_id!r}.",
            param="fine_tuning_job_id",
            code="fine_tuning_job_not_found",
        )
    return job


def list_page(
    session: Session,
    project_id: str,
    cursor: Cursor,
    *,
    metadata: dict[str, str] | None = None,
    without_metadata: bool = False,
) -> Page[Job]:
    """Return jobs newest first, optionally only those whose metadata holds all the given pairs."""
    query = select(Job).where(Job.project_id == project_id)
    for key, value in (metadata or {}).items():
        query = query.where(Job.request_metadata[key].as_string() == value)
    if without_metadata:
        query = query.where(Job.request_metadata.is_(None))
    return page(session, query, Job, (Job.created_at, Job.id), cursor)


def move(
    session: Session,
    job_id: str,
    target: JobStatus,
    *conditions: ColumnElement[bool],
    **values: Any,
) -> bool:
    """Change a job's status if the moves allow it and `conditions` hold; say whether it happened.

    This is the only place that writes ``jobs.status``.
    """
    if target.is_terminal:
        values |= {
            "finished_at": db_now(),
            "lease_owner": None,
            "lease_until": None,
            "estimated_finish": None,
        }
    result = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(sources_of(target)), *conditions)
        .values(status=target, **values)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


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


@dataclass(frozen=True, slots=True)
class _FileProblem:
    code: str
    message: str
    param: str


def advance_validated(session: Session, forms_of: Callable[[TrainingSpec], Collection[str]]) -> int:
    """Move every job whose files are linted to ``queued`` or ``failed``; return how many.

    Args:
        forms_of: Says which forms of rows a job's objective trains on.
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
        states = [
            _file_state(session, file_id, param, spec, forms_of(spec))
            for param, file_id in (
                ("training_file", job.training_file),
                ("validation_file", job.validation_file),
            )
            if file_id is not None
        ]
        if None in states:
            continue
        problem = next((state for state in states if isinstance(state, _FileProblem)), None)
        if problem is None:
            move(session, job.id, JobStatus.QUEUED)
            events.append(session, job.id, "Files validated, moving job to queued state")
        else:
            end_as_failed(session, job.id, problem.code, problem.message, problem.param)
        n_moved += 1
    return n_moved


def _file_state(
    session: Session, file_id: str, param: str, spec: TrainingSpec, forms: Collection[str]
) -> bool | _FileProblem | None:
    """Return True when a file can be trained on, None while it is not linted, else the problem."""
    file = session.get(File, file_id)
    if file is None:
        return _FileProblem("file_not_found", f"File {file_id} was deleted.", param)
    if file.status == FileStatus.UPLOADED:
        return None
    report = DatasetReport.model_validate(file.report)
    reason = file.status_details or "It has no usable row."
    if report.n_valid_rows and (file.status == FileStatus.PROCESSED or spec.on_error == "skip"):
        if report.form in forms:
            return True
        reason = (
            f"Its rows are {report.form} rows ({report.shape}); objective "
            f"'{spec.objective['type']}' trains on {', '.join(sorted(forms))} rows."
        )
    what = "training" if param == "training_file" else "validation"
    return _FileProblem(
        "invalid_file_format",
        f"The job failed due to a file format error in the {what} file. {reason}",
        param,
    )


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
