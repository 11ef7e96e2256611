"""Workers: each announces itself while it lives; what its slots are doing is told by the jobs."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete as sql_delete
from sqlalchemy import select
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.machine import Machine
from models.domain.status import JobStatus
from models.errors import NotFoundError
from models.tables import InferenceServer, Job, Worker

KEEP_SECONDS = 24 * 3600
"""How long a worker that fell silent is still told of."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a worker says of itself; the owner of a lease is ``{worker_id}:{slot}``."""

    worker_id: str
    host: str
    pid: int
    version: str
    slots: int
    machine: Machine


def announce(session: Session, worker: Announcement, ttl_seconds: float) -> None:
    """Say that a worker lives, for `ttl_seconds`; also clears away those lost for long."""
    session.execute(sql_delete(Worker).where(Worker.lease_until < db_now() - KEEP_SECONDS))
    now = session.scalar(select(db_now())) or 0.0
    machine = worker.machine.model_dump(mode="json")
    session.merge(
        Worker(
            id=worker.worker_id,
            host=worker.host,
            pid=worker.pid,
            version=worker.version,
            slots=worker.slots,
            **machine,
            seen_at=now,
            lease_until=now + ttl_seconds,
        )
    )


def withdraw(session: Session, worker_id: str) -> None:
    session.execute(sql_delete(Worker).where(Worker.id == worker_id))


def set_draining(session: Session, worker_id: str, draining: bool) -> Worker:
    """Have a worker take no new job, or take jobs again; what it trains goes on to its end.

    Raises:
        NotFoundError: no worker of this id lives.
    """
    worker = session.scalar(
        select(Worker).where(Worker.id == worker_id, Worker.lease_until >= db_now())
    )
    if worker is None:
        raise NotFoundError(f"No such worker: {worker_id!r}.", param="worker_id")
    worker.draining = draining
    return worker


def is_draining(session: Session, owner: str) -> bool:
    """Say whether the worker of a slot, given as `slot_owner` names it, takes no new job."""
    worker_id = owner.rpartition(":")[0]
    return bool(session.scalar(select(Worker.draining).where(Worker.id == worker_id)))


def slot_owner(worker_id: str, slot: int) -> str:
    """Return the name under which a slot leases its job."""
    return f"{worker_id}:{slot}"


@dataclass(frozen=True, slots=True)
class Busy:
    """A running job, as far as its slot is concerned."""

    job_id: str
    project_id: str
    step: int
    total_steps: int | None


def lost(session: Session) -> Sequence[Worker]:
    """Return the workers that fell silent within `KEEP_SECONDS` without a goodbye, newest first."""
    return session.scalars(
        select(Worker)
        .where(Worker.lease_until < db_now(), Worker.lease_until >= db_now() - KEEP_SECONDS)
        .order_by(Worker.lease_until.desc())
    ).all()


def alive(session: Session) -> Sequence[Worker]:
    """Return the workers that live, oldest first."""
    return session.scalars(
        select(Worker).where(Worker.lease_until >= db_now()).order_by(Worker.created_at, Worker.id)
    ).all()


def servers(session: Session) -> Sequence[InferenceServer]:
    """Return the inference servers that live, oldest first."""
    return session.scalars(
        select(InferenceServer)
        .where(InferenceServer.lease_until >= db_now())
        .order_by(InferenceServer.created_at, InferenceServer.id)
    ).all()


def busy_slots(session: Session) -> dict[str, Busy]:
    """Return the running jobs of all projects by the owner of their lease."""
    jobs = session.scalars(select(Job).where(Job.status == JobStatus.RUNNING))
    return {
        job.lease_owner: Busy(job.id, job.project_id, job.step, job.total_steps)
        for job in jobs
        if job.lease_owner is not None
    }
