"""What is asked of jobs most: one by its id, and the newest of a project. Both are prepared."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, select

from models.db import Database
from models.prepared import PreparedRows
from models.registry.jobs import not_found
from models.registry.page import Page
from models.tables import Job

_by_id = PreparedRows(
    Job, select(Job).where(Job.id == bindparam("id"), Job.project_id == bindparam("project_id"))
)
_newest = PreparedRows(
    Job,
    select(Job)
    .where(Job.project_id == bindparam("project_id"))
    .order_by(Job.created_at.desc(), Job.id.desc())
    .limit(bindparam("limit")),
)


def get(database: Database, project_id: str, job_id: str) -> Job:
    """Return a job as `jobs.get` does, only to be read."""
    found = _by_id.all(database, id=job_id, project_id=project_id)
    if not found:
        raise not_found(job_id)
    return found[0]


JobRow = tuple[Any, ...]
"""All columns of a job as SQLite's driver gives them, which can be compared and hashed."""
ID, STATUS = (_by_id.names.index(name) for name in ("id", "status"))


def row(database: Database, project_id: str, job_id: str) -> JobRow | None:
    """Return a job's columns, or None if the project has no such job."""
    found = _by_id.raw(database, id=job_id, project_id=project_id)
    return found[0] if found else None


def newest_rows(database: Database, project_id: str, limit: int) -> Sequence[JobRow]:
    """Return the columns of the newest jobs of a project."""
    return _newest.raw(database, project_id=project_id, limit=limit)


def job_of(database: Database, columns: JobRow) -> Job:
    """Return the job that has these columns, only to be read."""
    return _by_id.row(database, columns)


def newest(database: Database, project_id: str, limit: int) -> Page[Job]:
    """Return the first page of `jobs.list_page`, only to be read."""
    rows = _newest.all(database, project_id=project_id, limit=limit + 1)
    return Page(rows[:limit], len(rows) > limit)
