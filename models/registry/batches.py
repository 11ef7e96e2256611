"""Batches: created by their owner, run by whichever process holds the lease, ended once.

As with jobs, ownership is a lease on the database's clock plus the attempt number, and every write
of a runner is guarded by its attempt. A process that dies leaves its batch to the next one, which
goes on after the last line whose answer is a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CursorResult, func, insert, or_, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.base import JsonObject
from models.domain.status import BATCH_MOVES, BatchStatus
from models.domain.webhooks import batch_event
from models.errors import InvalidRequestError, LeaseLostError, NotFoundError
from models.registry import webhooks
from models.registry.page import Cursor, Page, page
from models.tables import Batch, BatchResult, new_id

WINDOW_SECONDS = {"24h": 24 * 3600}
_UNFINISHED = [status for status in BatchStatus if not status.is_terminal]


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What a caller asks for; `key_id` is the key whose requests the lines count as."""

    project_id: str
    key_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: JsonObject | None


def create(session: Session, new: NewBatch) -> Batch:
    """Add a batch in state ``validating``; a runner takes it from there."""
    batch = Batch(
        id=new_id("batch_"),
        project_id=new.project_id,
        key_id=new.key_id,
        endpoint=new.endpoint,
        input_file_id=new.input_file_id,
        completion_window=new.completion_window,
        request_metadata=new.metadata,
        expires_at=_now(session) + WINDOW_SECONDS[new.completion_window],
    )
    session.add(batch)
    session.flush()
    return batch


def get(session: Session, project_id: str, batch_id: str) -> Batch:
    """Return a batch of this project, or raise `NotFoundError`."""
    batch = session.scalar(
        select(Batch).where(Batch.id == batch_id, Batch.project_id == project_id)
    )
    if batch is None:
        raise NotFoundError(
            f"No such batch: {batch_id!r}.", param="batch_id", code="batch_not_found"
        )
    return batch


def list_page(session: Session, project_id: str, cursor: Cursor) -> Page[Batch]:
    query = select(Batch).where(Batch.project_id == project_id)
    return page(session, query, Batch, (Batch.created_at, Batch.id), cursor)


def user_of(session: Session, file_id: str) -> str | None:
    """Return the id of a batch that has not ended and reads this file, or None."""
    return session.scalar(
        select(Batch.id)
        .where(Batch.input_file_id == file_id, Batch.status.in_(_UNFINISHED))
        .limit(1)
    )


def cancel(session: Session, project_id: str, batch_id: str) -> Batch:
    """Ask for the end of a batch; what is answered already still comes in its files.

    Raises:
        NotFoundError: there is no such batch.
        InvalidRequestError: it has ended, or is writing its files.
    """
    batch = get(session, project_id, batch_id)
    if batch.status != BatchStatus.CANCELLING and not _move(
        session, batch_id, BatchStatus.CANCELLING
    ):
        session.refresh(batch)
        raise InvalidRequestError(
            f"Batch {batch_id} has status '{batch.status}'; it cannot be cancelled.",
            param="batch_id",
            code="batch_not_cancellable",
        )
    session.refresh(batch)
    return batch


def _waiting() -> tuple[Any, ...]:
    return (
        Batch.status.in_(_UNFINISHED),
        or_(Batch.lease_until.is_(None), Batch.lease_until < db_now()),
    )


def has_waiting(session: Session) -> bool:
    """Whether there is a batch that nobody runs; only reads."""
    return session.scalar(select(Batch.id).where(*_waiting()).limit(1)) is not None


def claim(session: Session, lease_seconds: float) -> Batch | None:
    """Take the oldest batch that nobody runs, with its new attempt number; None if all are."""
    batch = session.scalar(
        select(Batch)
        .where(*_waiting())
        .order_by(Batch.created_at, Batch.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if batch is None:
        return None
    batch.attempt += 1
    session.flush()
    renew(session, batch.id, batch.attempt, lease_seconds)
    session.refresh(batch)
    return batch


@dataclass(frozen=True, slots=True)
class Standing:
    """What a runner learns of its batch when it renews the lease."""

    status: BatchStatus
    is_expired: bool


def renew(session: Session, batch_id: str, attempt: int, lease_seconds: float) -> Standing:
    """Renew the lease; return how the batch stands. Raises `LeaseLostError`."""
    found = session.execute(
        update(Batch)
        .where(*_owned(batch_id, attempt))
        .values(lease_until=db_now() + lease_seconds)
        .returning(Batch.status, Batch.expires_at)
    ).one_or_none()
    if found is None:
        raise _lost(batch_id, attempt)
    return Standing(BatchStatus(found.status), found.expires_at <= _now(session))


def release(session: Session, batch_id: str, attempt: int) -> None:
    """Leave a batch to any runner at once; nothing happens if it is another's already."""
    session.execute(update(Batch).where(*_owned(batch_id, attempt)).values(lease_until=None))


def start(session: Session, batch: Batch, n_total: int, model: str | None) -> None:
    """Move a batch whose file is in order to ``in_progress``, unless it was cancelled.

    Raises:
        LeaseLostError: another runner has taken it.
    """
    fence(session, batch.id, batch.attempt)
    _move(session, batch.id, BatchStatus.IN_PROGRESS, n_total=n_total, model=model)


def fail(session: Session, batch: Batch, errors: Sequence[JsonObject]) -> None:
    """End a batch whose file is not in order, unless it was cancelled. Raises `LeaseLostError`."""
    fence(session, batch.id, batch.attempt)
    if _move(session, batch.id, BatchStatus.FAILED, errors={"data": list(errors)}):
        _tell(session, batch, BatchStatus.FAILED)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one line, counted from 1; `output` is its line in a file of the batch."""

    line: int
    failed: bool
    output: JsonObject
    input_tokens: int = 0
    output_tokens: int = 0


def record(session: Session, batch_id: str, attempt: int, answers: Sequence[Answer]) -> None:
    """Keep answers; from now on their lines are done. Raises `LeaseLostError`."""
    n_failed = sum(answer.failed for answer in answers)
    fence(
        session,
        batch_id,
        attempt,
        n_completed=Batch.n_completed + len(answers) - n_failed,
        n_failed=Batch.n_failed + n_failed,
        input_tokens=Batch.input_tokens + sum(answer.input_tokens for answer in answers),
        output_tokens=Batch.output_tokens + sum(answer.output_tokens for answer in answers),
    )
    if answers:
        session.execute(
            insert(BatchResult),
            [
                {
                    "batch_id": batch_id,
                    "line": answer.line,
                    "failed": answer.failed,
                    "output": answer.output,
                }
                for answer in answers
            ],
        )


def done_lines(session: Session, batch_id: str) -> set[int]:
    return set(session.scalars(select(BatchResult.line).where(BatchResult.batch_id == batch_id)))


def outputs(
    session: Session, batch_id: str, *, failed: bool, after: int, limit: int
) -> list[tuple[int, JsonObject]]:
    """Return the next lines of the output file, or of the error file, after a line number."""
    rows = session.execute(
        select(BatchResult.line, BatchResult.output)
        .where(
            BatchResult.batch_id == batch_id,
            BatchResult.failed == failed,
            BatchResult.line > after,
        )
        .order_by(BatchResult.line)
        .limit(limit)
    )
    return [(row.line, row.output) for row in rows]


def conclude(session: Session, batch: Batch) -> Batch:
    """Return the batch as it is to end: ``finalizing``, or ``cancelling`` if that was asked for."""
    fence(session, batch.id, batch.attempt)
    _move(session, batch.id, BatchStatus.FINALIZING)
    return session.get_one(Batch, batch.id, populate_existing=True)


def end(session: Session, batch: Batch, target: BatchStatus, **files: str | None) -> None:
    """End a batch whose files are stored, and drop the answers that stand in them.

    Args:
        session: The caller's.
        batch: As it was claimed.
        target: ``completed``, ``expired`` or ``cancelled``.
        files: `output_file_id` and `error_file_id`.

    Raises:
        LeaseLostError: another runner has taken it.
    """
    fence(session, batch.id, batch.attempt)
    if not _move(session, batch.id, target, **files):
        raise _lost(batch.id, batch.attempt)
    session.execute(sql_delete(BatchResult).where(BatchResult.batch_id == batch.id))
    _tell(session, batch, target)


def fence(session: Session, batch_id: str, attempt: int, **values: Any) -> None:
    """Write `values` if `attempt` still owns the batch. Raises `LeaseLostError`."""
    result = session.execute(
        update(Batch).where(*_owned(batch_id, attempt)).values(attempt=attempt, **values)
    )
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        raise _lost(batch_id, attempt)


def _move(session: Session, batch_id: str, target: BatchStatus, **values: Any) -> bool:
    """Change the status if the moves allow it, and note when; say whether it happened."""
    sources = [source for source, targets in BATCH_MOVES.items() if target in targets]
    values[f"{target}_at"] = func.coalesce(getattr(Batch, f"{target}_at"), db_now())
    if target.is_terminal:
        values["lease_until"] = None
    result = session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.status.in_(sources))
        .values(status=target, **values)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def _tell(session: Session, batch: Batch, status: BatchStatus) -> None:
    if (event := batch_event(status)) is not None:
        webhooks.emit(session, batch.project_id, event, batch.id)


def _owned(batch_id: str, attempt: int) -> tuple[Any, ...]:
    return (Batch.id == batch_id, Batch.attempt == attempt, Batch.status.in_(_UNFINISHED))


def _lost(batch_id: str, attempt: int) -> LeaseLostError:
    return LeaseLostError(f"Attempt {attempt} of batch {batch_id} has lost its lease.")


def _now(session: Session) -> float:
    return session.scalar(select(db_now())) or 0.0
