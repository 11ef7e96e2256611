"""Checkpoints: a row exists only after all its objects do."""

from collections.abc import Sequence

from sqlalchemy import bindparam, select
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from models.prepared import PreparedRows
from models.registry import events
from models.registry.page import Cursor, Page, page
from models.tables import Checkpoint

_after = PreparedRows(
    Checkpoint,
    select(Checkpoint)
    .where(Checkpoint.job_id == bindparam("job_id"), Checkpoint.step > bindparam("after"))
    .order_by(Checkpoint.step),
)


def record(session: Session, checkpoint: Checkpoint) -> None:
    """Add a checkpoint; one that a lost attempt wrote at the same step gives way to it."""
    session.execute(
        sql_delete(Checkpoint).where(
            Checkpoint.job_id == checkpoint.job_id, Checkpoint.step == checkpoint.step
        )
    )
    session.add(checkpoint)
    session.flush()
    events.append(
        session,
        checkpoint.job_id,
        f"Checkpoint created at step {checkpoint.step} with Snapshot ID: {checkpoint.name}",
    )


def newest_first(session: Session, job_id: str) -> Sequence[Checkpoint]:
    return session.scalars(
        select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())
    ).all()


def after(session: Session, job_id: str, step: int) -> Sequence[Checkpoint]:
    """Return the checkpoints after a step, in order, only to be read."""
    return _after.all(session, job_id=job_id, after=step)


def best(rows: Sequence[Checkpoint]) -> Checkpoint | None:
    """Return the one with the lowest loss on the whole validation split, if any was judged."""
    judged = [row for row in rows if "full_valid_loss" in row.metrics]
    return min(judged, key=lambda row: float(row.metrics["full_valid_loss"]), default=None)


def list_page(session: Session, job_id: str, cursor: Cursor) -> Page[Checkpoint]:
    query = select(Checkpoint).where(Checkpoint.job_id == job_id)
    return page(session, query, Checkpoint, (Checkpoint.step, Checkpoint.id), cursor)


def delete(session: Session, checkpoint_id: str) -> None:
    """Remove the row; its objects follow, since a row must never name missing objects."""
    session.execute(sql_delete(Checkpoint).where(Checkpoint.id == checkpoint_id))
