"""Quotas of projects: reserved when something is submitted, settled when it ends.

What a job will use is not known when it is submitted, so an expectation is reserved: its tokens
from the size of its files, its time from how long jobs on its base model took for a token. The
worker puts its own estimate in their place when the job starts; at the end they give way to what
was used. Checks hold the project's row, so that of many requests at once no two take the same room.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.status import JobStatus, UploadStatus
from models.domain.training import TrainingSpec
from models.errors import PayloadTooLargeError, QuotaError
from models.prepared import PreparedQuery, PreparedRows
from models.registry import usage
from models.registry.usage import DAY_SECONDS
from models.tables import File, Job, Project, Upload, Usage

BYTES_PER_TOKEN = 4
"""Of text in Latin letters; only until the tokens have been counted."""
EPOCHS = 3
"""What "auto" becomes for all but small data sets (docs/jobs.md)."""
HISTORY_DAYS = 30
WAITING = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.PAUSED)
UNFINISHED = (*WAITING, JobStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class InUse:
    """What of a project's limits is taken; reservations are part of tokens and hours."""

    bytes: int
    waiting_jobs: int
    running_jobs: int
    tokens_today: int
    device_hours_this_month: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a job is expected to take of its project's limits."""

    tokens: int
    device_seconds: float


NOTHING = Reservation(0, 0.0)
# NO KEY UPDATE: rows that refer to the project, such as a new file, may hold its key already.
_limits = PreparedRows(
    Project, select(Project).where(Project.id == bindparam("id")).with_for_update(key_share=True)
)
_time_and_tokens = PreparedQuery(
    select(func.sum(Usage.device_seconds), func.sum(Usage.trained_tokens)).where(
        Usage.model == bindparam("model"),
        Usage.day > db_now() / DAY_SECONDS - HISTORY_DAYS - 1,
    )
)


def in_use(session: Session, project_id: str) -> InUse:
    """Return what a project uses at this moment."""
    day = usage.today(session)
    held = _reserved(session, project_id)
    seconds = usage.total(session, project_id, _first_of_month(day)).device_seconds
    return InUse(
        bytes=_bytes(session, project_id),
        waiting_jobs=_n_jobs(session, project_id, WAITING),
        running_jobs=n_running(session, project_id),
        tokens_today=usage.total(session, project_id, day).tokens + held.tokens,
        device_hours_this_month=(seconds + held.device_seconds) / 3600,
    )


def room_for_bytes(session: Session, project_id: str) -> int | None:
    """Return how many bytes a project may still store, or None if there is no limit."""
    project = session.get_one(Project, project_id)
    if project.max_bytes is None:
        return None
    return max(0, project.max_bytes - _bytes(session, project_id))


def check_bytes(session: Session, project_id: str, n_bytes: int) -> None:
    """Make sure that there is room for more bytes; holds the project's row until the commit.

    Raises:
        PayloadTooLargeError: there is not (``quota_exceeded``).
    """
    project = _locked(session, project_id)
    if project.max_bytes is None:
        return
    taken = _bytes(session, project_id)
    if taken + n_bytes > project.max_bytes:
        raise bytes_exceeded(max(0, project.max_bytes - taken))


def bytes_exceeded(room: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"The project may store {room:,} more bytes, which is less than this file has. "
        "Delete files that are not needed, or have the limit raised.",
        param="file",
        code="quota_exceeded",
    )


def reserve(session: Session, project_id: str, spec: TrainingSpec, n_bytes: int) -> Reservation:
    """Return what to reserve for a job to be added; holds the project's row until the commit.

    Args:
        session: That which adds the job.
        project_id: Whose job it is.
        spec: What is to be trained.
        n_bytes: Size of its training file.

    Raises:
        QuotaError: too many jobs wait, or the tokens or hours that are left are not enough.
    """
    project = _limits.all(session, id=project_id)[0]
    wanted = _expected(session, spec, n_bytes)
    _check_waiting(session, project)
    _check_tokens(session, project, wanted.tokens)
    _check_hours(session, project, wanted.device_seconds)
    return wanted


def bind_jobs(session: Session, project_id: str) -> bool:
    """Whether a project has limits that its other jobs count towards."""
    project = _limits.all(session, id=project_id)[0]
    limits = (project.max_waiting_jobs, project.tokens_per_day, project.device_hours_per_month)
    return any(limit is not None for limit in limits)


def check_serving(session: Session, project_id: str, n_unwritten: int) -> None:
    """Make sure that a project may be served more tokens today.

    Args:
        session: The caller's.
        project_id: The project.
        n_unwritten: Tokens that were served and are in no row yet.

    Raises:
        QuotaError: the day's tokens are used up.
    """
    _check_tokens(session, session.get_one(Project, project_id), n_unwritten)


def _check_waiting(session: Session, project: Project) -> None:
    limit = project.max_waiting_jobs
    if limit is not None and _n_jobs(session, project.id, WAITING) >= limit:
        raise QuotaError(
            f"{limit} jobs of this project wait already, which is its limit. Submit this one when "
            "another has started or been cancelled."
        )


def _check_tokens(session: Session, project: Project, wanted: int) -> None:
    limit = project.tokens_per_day
    if limit is None:
        return
    used = usage.total(session, project.id, usage.today(session)).tokens
    taken = used + _reserved(session, project.id).tokens
    if taken >= limit or taken + wanted > limit:
        raise QuotaError(
            f"The project has used or reserved {taken:,} of the {limit:,} tokens that it has a "
            f"day, and this takes about {wanted:,}. Try again after midnight UTC, or have the limit"
            " raised."
        )


def _check_hours(session: Session, project: Project, wanted_seconds: float) -> None:
    limit = project.device_hours_per_month
    if limit is None:
        return
    day = usage.today(session)
    used = usage.total(session, project.id, _first_of_month(day)).device_seconds
    taken = (used + _reserved(session, project.id).device_seconds) / 3600
    if taken >= limit or taken + wanted_seconds / 3600 > limit:
        raise QuotaError(
            f"The project has used or reserved {taken:.2f} of the {limit:g} device hours that it "
            f"has a month, and this takes about {wanted_seconds / 3600:.2f}. Wait for the next "
            "month, or have the limit raised."
        )


def _locked(session: Session, project_id: str) -> Project:
    lock = {"key_share": True}  # as `_limits`
    return session.get_one(Project, project_id, with_for_update=lock, populate_existing=True)


def _bytes(session: Session, project_id: str) -> int:
    stored = select(func.coalesce(func.sum(File.bytes), 0)).where(File.project_id == project_id)
    begun = select(func.coalesce(func.sum(Upload.bytes), 0)).where(
        Upload.project_id == project_id, Upload.status == UploadStatus.PENDING
    )
    return int(session.scalar(stored) or 0) + int(session.scalar(begun) or 0)


def _n_jobs(session: Session, project_id: str, states: tuple[JobStatus, ...]) -> int:
    query = select(func.count()).select_from(Job)
    return session.scalar(query.where(Job.project_id == project_id, Job.status.in_(states))) or 0


def n_running(session: Session, project_id: str) -> int:
    return _n_jobs(session, project_id, (JobStatus.RUNNING,))


def _reserved(session: Session, project_id: str) -> Reservation:
    tokens, seconds = session.execute(
        select(
            func.coalesce(func.sum(Job.reserved_tokens), 0),
            func.coalesce(func.sum(Job.reserved_device_seconds), 0.0),
        ).where(Job.project_id == project_id, Job.status.in_(UNFINISHED))
    ).one()
    return Reservation(int(tokens), float(seconds))


def _expected(session: Session, spec: TrainingSpec, n_bytes: int) -> Reservation:
    """Return what a job is expected to take, from what is known before its files are read."""
    epochs = spec.hyperparameters.n_epochs
    tokens = n_bytes // BYTES_PER_TOKEN * (EPOCHS if epochs == "auto" else epochs)
    return Reservation(tokens, tokens * _seconds_per_token(session, spec.model))


def _seconds_per_token(session: Session, base_model: str) -> float:
    """Return the device time that a trained token took on a base model lately; 0 if none was."""
    ((seconds, tokens),) = _time_and_tokens.fetch(session, model=base_model)
    return float(seconds) / int(tokens) if seconds and tokens else 0.0


def _first_of_month(day: int) -> int:
    start = datetime.fromtimestamp(day * DAY_SECONDS, UTC).replace(day=1)
    return int(start.timestamp() // DAY_SECONDS)
