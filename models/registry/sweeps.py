"""Sweeps: jobs that differ in the fields of a grid, kept as one group."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from models.errors import NotFoundError
from models.registry.page import Cursor, Page, page
from models.tables import Job, Sweep, SweepJob


def create(session: Session, sweep: Sweep) -> Sweep:
    session.add(sweep)
    session.flush()
    return sweep


def add_job(
    session: Session, sweep: Sweep, position: int, job: Job, point: dict[str, object]
) -> None:
    """Add a job at a point of the grid; `position` counts from 0 in the order of the grid."""
    session.add(SweepJob(sweep_id=sweep.id, position=position, job_id=job.id, point=point))
    session.flush()


def get(session: Session, project_id: str, sweep_id: str) -> Sweep:
    """Return a sweep of this project, or raise `NotFoundError`."""
    sweep = session.get(Sweep, sweep_id)
    if sweep is None or sweep.project_id != project_id:
        raise NotFoundError(
            f"No such sweep: {sweep_id!r}.", param="sweep_id", code="sweep_not_found"
        )
    return sweep


def list_page(session: Session, project_id: str, cursor: Cursor) -> Page[Sweep]:
    query = select(Sweep).where(Sweep.project_id == project_id)
    return page(session, query, Sweep, (Sweep.created_at, Sweep.id), cursor)


def jobs_of(session: Session, sweep_ids: Sequence[str]) -> dict[str, list[tuple[SweepJob, Job]]]:
    """Return the jobs of some sweeps with their points, in the order of the grid."""
    rows = session.execute(
        select(SweepJob, Job)
        .join(Job, SweepJob.job_id == Job.id)
        .where(SweepJob.sweep_id.in_(sweep_ids))
        .order_by(SweepJob.sweep_id, SweepJob.position)
    )
    found: dict[str, list[tuple[SweepJob, Job]]] = {sweep_id: [] for sweep_id in sweep_ids}
    for member, job in rows:
        found[member.sweep_id].append((member, job))
    return found
