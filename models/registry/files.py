"""Files: created once their bytes are stored, linted by a worker, deleted when unused."""

from dataclasses import asdict, dataclass
from typing import Literal

from sqlalchemy import CursorResult, bindparam, func, or_, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.reports import DataOptions, DatasetReport, tell
from models.domain.status import FileStatus, JobStatus
from models.errors import InvalidRequestError, LeaseLostError, NotFoundError
from models.prepared import PreparedRows
from models.registry import batches
from models.registry.page import Cursor, Page, page
from models.storage import token_prefix
from models.tables import File, Job

TRAINABLE = "fine-tune"
BATCH = "batch"
BATCH_OUTPUT = "batch_output"
MAX_DETAILS = 8000
_by_id = PreparedRows(
    File,
    select(File).where(File.id == bindparam("id"), File.project_id == bindparam("project_id")),
)


@dataclass(frozen=True, slots=True)
class Freed:
    """Objects that no row refers to any more: keys, and prefixes of whole folders."""

    keys: list[str]
    prefixes: list[str]


@dataclass(frozen=True, slots=True)
class LintedObjects:
    """Keys of what the lint has stored; None for what there is none of."""

    findings_key: str | None = None
    rows_key: str | None = None
    cleaned_key: str | None = None


def create(session: Session, file: File) -> File:
    session.add(file)
    session.flush()
    return file


def find_same(session: Session, project_id: str, sha256: str, n_bytes: int) -> File | None:
    """Return the oldest file of a project with this content, its row locked, or None."""
    return session.scalar(
        select(File)
        .where(File.project_id == project_id, File.sha256 == sha256, File.bytes == n_bytes)
        .order_by(File.created_at, File.id)
        .limit(1)
        .with_for_update()
    )


def get(session: Session, project_id: str, file_id: str, *, param: str = "file_id") -> File:
    """Return a file of this project, or raise `NotFoundError` as for an id that never existed."""
    file = session.scalar(select(File).where(File.id == file_id, File.project_id == project_id))
    if file is None:
        raise not_found(file_id, param)
    return file


def read(session: Session, project_id: str, file_id: str, *, param: str) -> File:
    """Return a file as `get` does, only to be read."""
    found = _by_id.all(session, id=file_id, project_id=project_id)
    if not found:
        raise not_found(file_id, param)
    return found[0]


def not_found(file_id: str, param: str) -> NotFoundError:
    """Return the error for a file that does not exist, or that belongs to another project."""
    return NotFoundError(f"No such file: {file_id!r}.", param=param, code="file_not_found")


SortFiles = Literal["created_at", "filename", "bytes"]


def list_page(
    session: Session,
    project_id: str,
    cursor: Cursor,
    *,
    purpose: str | None = None,
    text: str = "",
    sort: SortFiles = "created_at",
) -> Page[File]:
    """Return files, newest first unless `sort` or the cursor says otherwise; `text` is in a name
    or an id.
    """
    query = select(File).where(File.project_id == project_id)
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    if text:
        places = (File.id, File.filename)
        query = query.where(or_(*(place.icontains(text, autoescape=True) for place in places)))
    return page(session, query, File, (getattr(File, sort), File.id), cursor)


def with_rows(session: Session, project_id: str, *file_ids: str | None) -> str | None:
    """Return the first of these files that is still there and has usable rows."""
    found = session.scalars(
        select(File.id).where(
            File.project_id == project_id, File.id.in_(file_ids), File.rows_key.is_not(None)
        )
    ).all()
    return next((each for each in file_ids if each in found), None)


@dataclass(frozen=True, slots=True)
class FileChoice:
    """What a form needs of a file to offer it."""

    id: str
    filename: str
    bytes: int


def newest(session: Session, project_id: str, purpose: str, limit: int) -> list[FileChoice]:
    """Return the newest files without their reports, which may be long."""
    rows = session.execute(
        select(File.id, File.filename, File.bytes)
        .where(File.project_id == project_id, File.purpose == purpose)
        .order_by(File.created_at.desc(), File.id.desc())
        .limit(limit)
    )
    return [FileChoice(*row) for row in rows]


def delete(session: Session, project_id: str, file_id: str) -> Freed:
    """Remove the row of a file that no unfinished job uses; return the objects that are free now.

    Raises:
        NotFoundError: there is no such file.
        InvalidRequestError: a job that has not ended uses it (code ``file_in_use``).
    """
    file = get(session, project_id, file_id)
    user = _unfinished_user(session, file)
    if user is not None:
        raise InvalidRequestError(
            f"File {file_id} is used by {user}, which has not ended. Cancel that first.",
            param="file_id",
            code="file_in_use",
        )
    session.execute(sql_delete(File).where(File.id == file.id))
    freed = _made_by_lint(session, file)
    n_sharing = session.scalar(select(func.count()).where(File.object_key == file.object_key))
    return freed if n_sharing else Freed([file.object_key, *freed.keys], freed.prefixes)


def _unfinished_user(session: Session, file: File) -> str | None:
    """Return the job or batch that still needs a file, with its kind."""
    unfinished = [status for status in JobStatus if not status.is_terminal]
    job = session.scalar(
        select(Job.id)
        .where(
            or_(Job.training_file == file.id, Job.validation_file == file.id),
            Job.status.in_(unfinished),
        )
        .limit(1)
    )
    if job is not None:
        return f"job {job}"
    batch = batches.user_of(session, file.id)
    return None if batch is None else f"batch {batch}"


def read_anew(
    session: Session, project_id: str, file_id: str, options: DataOptions
) -> tuple[File, Freed]:
    """Have a data set linted again with other options; return it and what objects are free now.

    Raises:
        NotFoundError: there is no such file.
        InvalidRequestError: it is no data set, or a job that has not ended uses it.
    """
    file = get(session, project_id, file_id)
    if file.purpose != TRAINABLE:
        raise InvalidRequestError(
            f"File {file_id} has purpose '{file.purpose}', so it is no data set.",
            param="file_id",
            code="invalid_file_purpose",
        )
    user = _unfinished_user(session, file)
    if user is not None:
        raise InvalidRequestError(
            f"File {file_id} is used by {user}, which has not ended. Cancel that first.",
            param="file_id",
            code="file_in_use",
        )
    freed = _made_by_lint(session, file)
    session.execute(
        update(File)
        .where(File.id == file.id)
        .values(
            status=FileStatus.UPLOADED,
            status_details=None,
            options=options.model_dump(mode="json"),
            report=None,
            findings_key=None,
            rows_key=None,
            cleaned_key=None,
            data_sha256=None,
            lease_until=None,
        )
    )
    session.refresh(file)
    return file, freed


def _made_by_lint(session: Session, file: File) -> Freed:
    """Return the objects made from a file; tokenised rows only if no other file has its content."""
    keys = (file.findings_key, file.rows_key, file.cleaned_key)
    same_content = select(File.id).where(File.data_sha256 == file.data_sha256, File.id != file.id)
    is_last = file.data_sha256 is not None and session.scalar(same_content.limit(1)) is None
    return Freed(
        [key for key in keys if key is not None],
        [token_prefix(file.data_sha256)] if is_last and file.data_sha256 else [],
    )


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


def keep_claim(session: Session, file_id: str, lease_seconds: float) -> None:
    """Reserve a file for longer. Raises `LeaseLostError` if it is gone or was linted meanwhile."""
    result = session.execute(
        update(File)
        .where(File.id == file_id, File.status == FileStatus.UPLOADED)
        .values(lease_until=db_now() + lease_seconds)
    )
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        raise LeaseLostError(f"File {file_id} is gone, or another worker has linted it.")


def record_report(
    session: Session,
    file_id: str,
    report: DatasetReport,
    objects: LintedObjects | None = None,
) -> bool:
    """Store the result of a lint; the first wins. Return whether it was this one."""
    objects = objects or LintedObjects()
    result = session.execute(
        update(File)
        .where(File.id == file_id, File.status == FileStatus.UPLOADED)
        .values(
            status=FileStatus.ERROR if report.n_findings else FileStatus.PROCESSED,
            status_details=_details(report),
            report=report.model_dump(mode="json"),
            data_sha256=report.data_sha256 or None,
            lease_until=None,
            **asdict(objects),
        )
    )
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def _details(report: DatasetReport) -> str | None:
    """Return the errors as sentences, as many as fit into a message that people read."""
    return tell(report.findings, report.n_findings, MAX_DETAILS) or None
