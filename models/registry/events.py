"""Events of a job: append-only, numbered without gaps."""

from collections.abc import Mapping, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from models.domain.base import JsonObject
from models.domain.status import EventLevel
from models.prepared import PreparedInsert
from models.registry.page import Cursor, Page, page
from models.tables import Event, Job, new_id

_insert = PreparedInsert(Event)


def append(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: EventLevel = EventLevel.INFO,
    data: JsonObject | None = None,
) -> None:
    """Add one event; `data` makes it an event of type ``metrics``, else it is a ``message``."""
    # The lock on the job row makes the next number ours until the commit.
    session.execute(select(Job.id).where(Job.id == job_id).with_for_update())
    last = last_sequence(session, job_id)
    session.add(
        Event(
            id=new_id("ftevent-"),
            job_id=job_id,
            sequence=last + 1,
            level=level,
            type="message" if data is None else "metrics",
            message=message,
            data=data,
        )
    )
    session.flush()


def begin(session: Session, messages: Mapping[str, Sequence[str]]) -> None:
    """Add the first events of jobs that were just added and that nobody else can see yet.

    Args:
        session: That which added the jobs.
        messages: Of each job, by its id.
    """
    rows = [
        {
            "id": new_id("ftevent-"),
            "job_id": job_id,
            "sequence": sequence,
            "level": EventLevel.INFO,
            "type": "message",
            "message": message,
        }
        for job_id, told in messages.items()
        for sequence, message in enumerate(told, start=1)
    ]
    _insert.add(session, *rows)


def marks(session: Session, job_ids: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return status and newest event number of jobs: whatever is news of a job changes them."""
    newest = (
        select(func.max(Event.sequence)).where(Event.job_id == Job.id).correlate(Job)
    ).scalar_subquery()
    rows = session.execute(select(Job.id, Job.status, newest).where(Job.id.in_(job_ids)))
    return {job_id: (status, sequence or 0) for job_id, status, sequence in rows}


def list_page(session: Session, job_id: str, cursor: Cursor) -> Page[Event]:
    """Return events newest first; the cursor's `after` is an event id."""
    query = select(Event).where(Event.job_id == job_id)
    return page(session, query, Event, (Event.sequence, Event.id), cursor)


def messages(session: Session, job_id: str, limit: int) -> Sequence[Event]:
    """Return the newest events that are no metrics, newest first."""
    return session.scalars(
        select(Event)
        .where(Event.job_id == job_id, Event.type == "message")
        .order_by(Event.sequence.desc())
        .limit(limit)
    ).all()


def last_sequence(session: Session, job_id: str) -> int:
    return session.scalar(select(func.max(Event.sequence)).where(Event.job_id == job_id)) or 0


def after(session: Session, job_id: str, sequence: int, limit: int) -> Sequence[Event]:
    """Return the events after a number, in order."""
    return session.scalars(
        select(Event)
        .where(Event.job_id == job_id, Event.sequence > sequence)
        .order_by(Event.sequence)
        .limit(limit)
    ).all()
