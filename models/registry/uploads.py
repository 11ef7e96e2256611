"""Uploads in parts: rows for what has come so far, so that a restart of the API loses nothing."""

from sqlalchemy import delete as sql_delete
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.status import UploadStatus
from models.errors import InvalidRequestError, NotFoundError
from models.storage import part_key
from models.tables import Upload, UploadPart, new_id

LIFE_SECONDS = 3600
MAX_REPEATS = 4


def create(session: Session, upload: Upload) -> Upload:
    """Add an upload that lives for an hour; `id` and `expires_at` are set here."""
    upload.id = new_id("upload_")
    upload.expires_at = (session.scalar(select(db_now())) or 0.0) + LIFE_SECONDS
    session.add(upload)
    session.flush()
    return upload


def get(session: Session, project_id: str, upload_id: str) -> Upload:
    """Return an upload of this project, or raise `NotFoundError`."""
    upload = session.scalar(
        select(Upload).where(Upload.id == upload_id, Upload.project_id == project_id)
    )
    if upload is None:
        raise NotFoundError(
            f"No such upload: {upload_id!r}.", param="upload_id", code="upload_not_found"
        )
    return upload


def get_pending(session: Session, project_id: str, upload_id: str) -> Upload:
    """Return an upload that still takes parts, its row locked.

    Raises:
        NotFoundError: there is no such upload.
        InvalidRequestError: it is completed, cancelled or expired (code ``upload_not_pending``).
    """
    upload = get(session, project_id, upload_id)
    session.refresh(upload, with_for_update=True)
    require_pending(session, upload)
    return upload


def require_pending(session: Session, upload: Upload) -> None:
    """Raise `InvalidRequestError` (code ``upload_not_pending``) if an upload has ended."""
    status = upload.status
    if status == UploadStatus.PENDING:
        if upload.expires_at >= (session.scalar(select(db_now())) or 0.0):
            return
        status = UploadStatus.EXPIRED
    raise InvalidRequestError(
        f"Upload {upload.id} is {status}; it takes no parts and cannot be changed.",
        param="upload_id",
        code="upload_not_pending",
    )


def add_part(session: Session, upload: Upload, part_id: str, n_bytes: int) -> UploadPart:
    """Add a part whose bytes are stored.

    Raises:
        InvalidRequestError: all parts together are several times as large as the file.
    """
    n_all = n_bytes + sum(part.bytes for part in parts(session, upload.id))
    if n_all > MAX_REPEATS * upload.bytes:
        raise InvalidRequestError(
            f"The parts of upload {upload.id} have {n_all:,} bytes; {upload.bytes:,} were "
            "announced, and a part is sent again a few times at most.",
            param="data",
            code="upload_too_large",
        )
    part = UploadPart(id=part_id, upload_id=upload.id, bytes=n_bytes)
    session.add(part)
    session.flush()
    return part


def parts(session: Session, upload_id: str) -> list[UploadPart]:
    """Return the parts of an upload in the order in which they came."""
    query = (
        select(UploadPart)
        .where(UploadPart.upload_id == upload_id)
        .order_by(UploadPart.created_at, UploadPart.id)
    )
    return list(session.scalars(query))


def finish(
    session: Session, upload: Upload, status: UploadStatus, file_id: str | None
) -> list[str]:
    """End a pending upload; return the keys of its parts, which nobody needs any more."""
    keys = [part_key(upload.id, part.id) for part in parts(session, upload.id)]
    session.execute(
        update(Upload)
        .where(Upload.id == upload.id, Upload.status == UploadStatus.PENDING)
        .values(status=status, file_id=file_id)
    )
    if status != UploadStatus.COMPLETED:
        session.execute(sql_delete(UploadPart).where(UploadPart.upload_id == upload.id))
    session.refresh(upload)
    return keys


def expire(session: Session) -> list[str]:
    """End every upload whose hour is over; return the keys of the objects to delete."""
    late = session.scalars(
        select(Upload)
        .where(Upload.status == UploadStatus.PENDING, Upload.expires_at < db_now())
        .with_for_update(skip_locked=True)
    ).all()
    return [key for upload in late for key in finish(session, upload, UploadStatus.EXPIRED, None)]
