"""Whose turn it is: projects that wait for workers get time on devices by their shares.

A project's turn comes when it has had the least device time of the last hour for its share, running
jobs included. A project with a thousand jobs and one with ten so alternate, and what a project left
unused is not saved up for ever.
"""

from sqlalchemy import Float, case, cast, func, or_, select
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.status import JobStatus
from models.tables import Job, JobAttempt, Project

WINDOW_SECONDS = 3600.0


def order(session: Session) -> list[str]:
    """Return the projects that have queued jobs, the one whose turn it is first.

    Of those that had equally little, the one goes first whose next job has the highest priority,
    then whose job is the oldest.
    """
    had = device_seconds(session)
    waiting = session.execute(
        select(Project.id, Project.share, func.max(Job.priority), func.min(Job.created_at))
        .join(Job, Job.project_id == Project.id)
        .where(Job.status == JobStatus.QUEUED)
        .group_by(Project.id, Project.share)
    ).all()
    ranked = sorted(
        (had.get(project, 0.0) / share, -priority, oldest, project)
        for project, share, priority, oldest in waiting
    )
    return [project for *_, project in ranked]


def device_seconds(session: Session) -> dict[str, float]:
    """Return how long the jobs of each project held devices within the last `WINDOW_SECONDS`."""
    now = session.scalar(select(db_now())) or 0.0
    start = now - WINDOW_SECONDS
    ended = func.coalesce(JobAttempt.ended_at, now)
    begun = case((JobAttempt.started_at < start, start), else_=JobAttempt.started_at)
    devices = func.coalesce(Job.spec["num_devices"].as_integer(), 1)
    rows = session.execute(
        select(Job.project_id, func.sum(cast(ended - begun, Float) * devices))
        .join(Job, JobAttempt.job_id == Job.id)
        .where(or_(JobAttempt.ended_at.is_(None), JobAttempt.ended_at > start))
        .group_by(Job.project_id)
    )
    return {project: float(seconds) for project, seconds in rows}
