"""Files: created once their bytes are stored, linted by a worker, deleted when unused."""

from sqlalchemy import delete as sql_delete
from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.reports import DatasetReport
from models.domain.status import FileStatus, JobStatus
from models.errors import InvalidRequestError, NotFoundError
from models.registry.page import Cursor, Page, page
from models.tables import File, Job

TRAINABLE = "fine-tune"


def create(session: Session, file: File) -> File:
    session.add(file)
    session.flush()
    return file


def get(session: Session, project_id: str, file_id: str, *, param: str = "file_id") -> File:
    """Return a file of this project, or raise `NotFoundError` as for an id that never existed."""
    file = session.scalar(select(File).where(File.id == file_id, File.project_id == project_id))
    if file is None:
        raise NotFoundError(f"No such file: {file_id!r}.", param=param, code="file_not_found")
    return file


def list_page(
    session: Session, project_id: str, cursor: Cursor, *, purpose: str | None = None
) -> Page[File]:
    query = select(File).where(File.project_id == project_id)
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    return page(session, query, File, (File.created_at, File.id), cursor)


def delete(session: Session, project_id: str, file_id: str) -> None:
    """Remove the row of a file that no unfinished job uses.

    Raises:
        NotFoundError: there is no such file.
        InvalidRequestError: a job that has not ended uses it (code ``file_in_use``).
    """
    file = get(session, project_id, file_id)
    unfinished = [status for status in JobStatus if not status.is_terminal]
    user = session.scalar(
        select(Job.id)
        .where(
            or_(Job.training_file == file.id, Job.validation_file == file.id),
            Job.status.in_(unfinished),
        )
        .limit(1)
    )
    if user is not None:
        raise InvalidRequestError(
            f"File {file_id} is used by job {user}, which has not ended. Cancel the job first.",
            param="file_id",
            code="file_in_use",
        )
    session.execute(sql_delete(File).where(File.id == file.id))


def claim_unvalidated(session: Session, lease_seconds: float) -> File | None:
    """Reserve one training file that nobody has linted yet, for `lease_seconds`."""
    query = (
        select(File)
        .where(
            File.status == FileStatus.UPLOADED,
            File.purpose == TRAINABLE,
            or_(File.lease_until.is_(None), File.lease_until < db_now()),
        )
        .order_by(File.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    file = session.scalar(query)
    if file is not None:
        session.execute(
            update(File).where(File.id == file.id).values(lease_until=db_now() + lease_seconds)
        )
    return file


def record_report(session: Session, file_id: str, report: DatasetReport) -> None:
    """Store the result of a lint; the first wins, as a lint depends on the bytes alone."""
    status = FileStatus.ERROR if report.n_findings else FileStatus.PROCESSED
    details = report.findings[0].sentence() if report.findings else None
    if report.n_findings > 1:
        details = f"{details} ({report.n_findings} errors in all.)"
    session.execute(
        update(File)
        .where(File.id == file_id, File.status == FileStatus.UPLOADED)
        .values(
            status=status,
            status_details=details,
            report=report.model_dump(mode="json"),
            lease_until=None,
        )
    )
