"""Idempotency keys: one request of a name is carried out, its repetitions get its answer."""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models.db import db_now
from models.errors import ConflictError, UnprocessableError
from models.tables import IdempotencyKey

KEPT_SECONDS = 24 * 3600
RETRY_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as it went out."""

    status: int
    content_type: str
    body: bytes


def claim(session: Session, project_id: str, key: str, request_sha256: str) -> Answer | None:
    """Take a key for a request to carry out, or return the answer of the same request before.

    A claim lasts for `KEPT_SECONDS`, also when the process that made it is gone: whether its
    request took effect is unknown then, and it must never take effect twice.

    Raises:
        ConflictError: the same request is being carried out (``retry_after`` is set).
        UnprocessableError: the key belongs to another request.
    """
    session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.created_at < db_now() - KEPT_SECONDS)
    )
    claimed = IdempotencyKey(project_id=project_id, key=key, request_sha256=request_sha256)
    try:
        with session.begin_nested():
            session.add(claimed)
        return None
    except IntegrityError:
        # Only the primary key can be at fault; the row that holds it is committed by now.
        row = session.scalars(select(IdempotencyKey).where(*_is(project_id, key))).one()
    if row.request_sha256 != request_sha256:
        raise UnprocessableError(
            "This Idempotency-Key was used for another request. Use a new key for a new request.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    if row.status is None:
        raise ConflictError(
            "The first request with this Idempotency-Key has not been answered yet.",
            param="Idempotency-Key",
            code="idempotency_key_in_use",
            retry_after=RETRY_SECONDS,
        )
    return Answer(row.status, row.content_type or "", row.body or b"")


def settle(session: Session, project_id: str, key: str, answer: Answer) -> None:
    """Keep the answer of a claimed request for its repetitions."""
    session.execute(
        update(IdempotencyKey)
        .where(*_is(project_id, key))
        .values(status=answer.status, content_type=answer.content_type, body=answer.body)
    )


def release(session: Session, project_id: str, key: str) -> None:
    """Give a claim back whose request had no effect, so that it can be tried again."""
    session.execute(delete(IdempotencyKey).where(*_is(project_id, key)))


def _is(project_id: str, key: str) -> tuple[ColumnElement[bool], ...]:
    return IdempotencyKey.project_id == project_id, IdempotencyKey.key == key
