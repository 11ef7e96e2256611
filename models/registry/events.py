"""Events of a job: append-only, numbered without gaps."""

from collections.abc import Mapping, Sequence

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from models.domain.base import JsonObject
from models.domain.status import EventLevel
from models.prepared import PreparedInsert, PreparedQuery, PreparedRows
from models.registry.page import Cursor, Page, page
from models.tables import Event, Job, ordered_id

_insert = PreparedInsert(Event)
_after = PreparedRows(
    Event,
    select(Event)
    .where(Event.job_id == bindparam("job_id"), Event.sequence > bindparam("after"))
    .order_by(Event.sequence)
    .limit(bindparam("limit")),
)
MARKED = 50
"""Jobs whose marks one statement finds."""
_marks = PreparedQuery(
    select(
        Job.id,
        Job.status,
        select(func.max(Event.sequence))
        .where(Event.job_id == Job.id)
        .correlate(Job)
        .scalar_subquery(),
    ).where(Job.id.in_([bindparam(f"id_{number}") for number in range(MARKED)]))
)


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
            id=ordered_id("ftevent-"),
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
            "id": ordered_id("ftevent-"),
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
    found: dict[str, tuple[str, int]] = {}
    for start in range(0, len(job_ids), MARKED):
        asked = job_ids[start : start + MARKED]
        # Always the same statement: the last places are filled with a job that is asked for anyway.
        ids = {f"id_{at}": asked[min(at, len(asked) - 1)] for at in range(MARKED)}
        for job_id, status, sequence in _marks.fetch(session, **ids):
            found[job_id] = (status, sequence or 0)
    return found


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
    """Return the events after a number, in order, only to be read."""
    return _after.all(session, job_id=job_id, after=sequence, limit=limit)
