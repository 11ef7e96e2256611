"""Whose turn it is: projects that wait for workers get time on devices by their shares.

A project's turn comes when it has had the least device time of the last hour for its share, running
jobs included. A project with a thousand jobs and one with ten so alternate, and what a project left
unused is not saved up for ever.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Float, Select, case, cast, func, or_, select
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.status import JobStatus
from models.tables import Job, JobAttempt, Project

WINDOW_SECONDS = 3600.0
MAX_PLACED = 1000
"""So many jobs of a project are told their place in the queue; those behind are not."""
USUAL_SECONDS = 60.0
"""Device time of a job, where none has run within the window."""
_NEXT_FIRST = (Job.priority.desc(), Job.created_at, Job.id)


def order(session: Session) -> list[str]:
    """Return the projects that have queued jobs, the one whose turn it is first.

    Of those that had equally little, the one goes first whose next job has the highest priority,
    then whose job is the oldest.
    """
    waiting = _waiting(session, device_seconds(session))
    return [each.project_id for each in sorted(waiting, key=lambda each: (each.had, each.tie))]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A project with queued jobs; `had` is its device time for its share."""

    project_id: str
    share: float
    n_queued: int
    had: float
    tie: tuple[int, float, str]


def _waiting(session: Session, seconds: dict[str, float]) -> list[_Waiting]:
    rows = session.execute(
        select(
            Project.id,
            Project.share,
            func.count(Job.id),
            func.max(Job.priority),
            func.min(Job.created_at),
        )
        .join(Job, Job.project_id == Project.id)
        .where(Job.status == JobStatus.QUEUED)
        .group_by(Project.id, Project.share)
    )
    return [
        _Waiting(project, share, n, seconds.get(project, 0.0) / share, (-priority, oldest, project))
        for project, share, n, priority, oldest in rows
    ]


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the queue of all projects: 1 is next, `length` jobs are queued."""

    position: int
    length: int


def places(session: Session, jobs: Iterable[Job]) -> dict[str, Place]:
    """Return the places of those of these jobs that are queued, by their ids.

    They are expected in the order in which `job_runs.claim` takes them when each job takes as long
    as those of the last hour did on average. A job with more than `MAX_PLACED` jobs of its own
    project before it has no place.
    """
    wanted = [job for job in jobs if job.status == JobStatus.QUEUED]
    if not wanted:
        return {}
    waiting = {each.project_id: each for each in _waiting(session, device_seconds(session))}
    length = sum(each.n_queued for each in waiting.values())
    seconds = _usual_seconds(session)
    ranks = {
        project: {job_id: rank for rank, job_id in enumerate(_next_jobs(session, project))}
        for project in {job.project_id for job in wanted}
    }
    found = {}
    for job in wanted:
        rank = ranks[job.project_id].get(job.id)
        own = waiting.get(job.project_id)
        if rank is not None and own is not None:  # it may have been queued between the two queries
            others = [each for each in waiting.values() if each is not own]
            before = rank + sum(_n_before(each, own, rank, seconds) for each in others)
            found[job.id] = Place(before + 1, length)
    return found


def _n_before(other: _Waiting, own: _Waiting, rank: int, seconds: float) -> int:
    """Return how many jobs of `other` are taken before the job of `own` that `rank` jobs precede.

    The k-th job of a project (from 0) is taken when the project has had ``had + k · seconds /
    share``; that is less than, or as much as, `own` then has for those k that are counted here.
    """
    due = own.had + rank * seconds / own.share
    k = (due - other.had) * other.share / seconds
    if math.isclose(k, round(k), abs_tol=1e-9):
        n = round(k) + (1 if other.tie < own.tie else 0)
    else:
        n = math.ceil(k)
    return min(max(n, 0), other.n_queued)


def _next_jobs(session: Session, project_id: str) -> Sequence[str]:
    return session.scalars(
        select(Job.id)
        .where(Job.project_id == project_id, Job.status == JobStatus.QUEUED)
        .order_by(*_NEXT_FIRST)
        .limit(MAX_PLACED)
    ).all()


def next_job(session: Session, project_id: str) -> Job | None:
    """Return the next queued job of a project, locked; one that is being taken is passed over."""
    return session.scalar(queued(project_id).limit(1))


def queued(project_id: str) -> Select[Job]:
    """Select the queued jobs of a project, the next one first, those that are being taken not."""
    return (
        select(Job)
        .where(Job.project_id == project_id, Job.status == JobStatus.QUEUED)
        .order_by(*_NEXT_FIRST)
        .with_for_update(skip_locked=True)
    )


def _usual_seconds(session: Session) -> float:
    """Return the mean device time of the attempts that ended within the window."""
    devices = func.coalesce(Job.spec["num_devices"].as_integer(), 1)
    taken = cast(JobAttempt.ended_at - JobAttempt.started_at, Float) * devices
    mean = session.scalar(
        select(func.avg(taken))
        .join(Job, JobAttempt.job_id == Job.id)
        .where(JobAttempt.ended_at > db_now() - WINDOW_SECONDS)
    )
    return max(float(mean), 1e-3) if mean else USUAL_SECONDS


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
