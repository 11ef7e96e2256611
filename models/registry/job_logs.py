"""What the trainers of a job wrote to standard error: appended, bounded, read by offset.

An offset counts the bytes of the whole log (UTF-8) and stays what it is when old lines go.
"""

import re
from dataclasses import dataclass

from sqlalchemy import delete as sql_delete
from sqlalchemy import select
from sqlalchemy.orm import Session

from models.domain.status import JobStatus
from models.errors import InvalidRequestError
from models.tables import Job, JobAttempt, JobLogPart

PART_BYTES = 64 * 1024
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True, slots=True)
class LogText:
    """Lines of a log: from `start` to `next`, of a log that now reaches from `first` to `end`."""

    text: str
    start: int
    next: int
    first: int
    end: int


def append(session: Session, job_id: str, attempt: int, text: str, keep_bytes: int) -> bool:
    """Add lines, and drop the oldest beyond `keep_bytes`; say whether they were added.

    They are not when the job has a newer attempt. Control characters, which a terminal would obey
    and PostgreSQL refuses, become U+FFFD.
    """
    # The lock on the job row makes the next offset ours until the commit.
    current = session.scalar(select(Job.attempt).where(Job.id == job_id).with_for_update())
    if current != attempt:
        return False
    _, end = _reach(session, job_id)
    for piece in _pieces(_plain(text)):
        n_bytes = len(piece.encode())
        session.add(
            JobLogPart(job_id=job_id, start=end, n_bytes=n_bytes, attempt=attempt, text=piece)
        )
        end += n_bytes
    session.flush()
    old = (JobLogPart.job_id == job_id, JobLogPart.start + JobLogPart.n_bytes <= end - keep_bytes)
    session.execute(sql_delete(JobLogPart).where(*old))
    return True


def _plain(text: str) -> str:
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def _pieces(text: str) -> list[str]:
    """Cut a text into parts of whole lines, of about `PART_BYTES` unless a line is longer."""
    pieces: list[str] = []
    size = PART_BYTES
    for line in _LINE.findall(text):
        if size >= PART_BYTES:
            pieces.append("")
            size = 0
        pieces[-1] += line
        size += len(line.encode())
    return [piece for piece in pieces if piece]


def read(session: Session, job_id: str, after: int | None, limit: int) -> LogText:
    """Return at most `limit` bytes of whole lines: from an offset on, or without one the last.

    Where the lines at `after` are gone, it begins with the oldest that are kept. A line that is
    longer than `limit` is cut.

    Raises:
        InvalidRequestError: `after` lies behind the end.
    """
    first, end = _reach(session, job_id)
    if after is not None and after > end:
        raise InvalidRequestError(
            f"'after' is {after:,}; the log has {end:,} bytes. Use 'next_offset' of an answer.",
            param="after",
        )
    start = max(first, end - limit if after is None else after)
    data = _bytes_from(session, job_id, start, limit)
    if after is None and start > first:
        # The tail begins in the middle of a line.
        skipped = data.find(b"\n") + 1
        start, data = start + skipped, data[skipped:]
    if len(data) > limit or start + len(data) < end:
        data = data[:limit]
        data = data[: data.rfind(b"\n") + 1] or _whole_characters(data)
    return LogText(data.decode(errors="replace"), start, start + len(data), first, end)


def is_complete(session: Session, job: Job) -> bool:
    """Say whether nothing will come any more: the job and its last attempt have ended."""
    if not JobStatus(job.status).is_terminal:
        return False
    last = session.get(JobAttempt, (job.id, job.attempt))
    return last is None or last.ended_at is not None


def _whole_characters(data: bytes) -> bytes:
    """Leave out a character that was cut at the end; a single one is never left out."""
    return data.decode(errors="ignore").encode() or data


def _reach(session: Session, job_id: str) -> tuple[int, int]:
    """Return the offsets at which the kept log begins and ends."""
    parts = select(JobLogPart.start, JobLogPart.n_bytes).where(JobLogPart.job_id == job_id)
    oldest = session.execute(parts.order_by(JobLogPart.start).limit(1)).one_or_none()
    newest = session.execute(parts.order_by(JobLogPart.start.desc()).limit(1)).one_or_none()
    if oldest is None or newest is None:
        return 0, 0
    return oldest.start, newest.start + newest.n_bytes


def _bytes_from(session: Session, job_id: str, start: int, limit: int) -> bytes:
    """Return what is kept from an offset on: `limit` bytes, or a little more."""
    parts = session.execute(
        select(JobLogPart.start, JobLogPart.text)
        .where(JobLogPart.job_id == job_id, JobLogPart.start + JobLogPart.n_bytes > start)
        .order_by(JobLogPart.start)
        .execution_options(yield_per=8)
    )
    data = b""
    for part in parts:
        data += part.text.encode()[max(0, start - part.start) :]
        if len(data) >= limit:
            break
    parts.close()
    return data
