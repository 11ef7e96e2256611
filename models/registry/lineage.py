"""Lineage: by which jobs and from what data a model came to be, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from models.domain.training import TrainingSpec
from models.registry.adapters import ResolvedModel
from models.tables import Adapter, Checkpoint, File, Job

MAX_SUCCESSORS = 100


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One training on the way from the base model to a model.

    `name` and `digest` are those of its result; `is_live` says whether that can still be called.
    `job` is None when the result was a checkpoint that has been cleared away since, or came from
    outside; what came before it is then unknown. `training_file` and
    `validation_file` are None when the file was deleted, or there was none.
    """

    name: str
    digest: str
    is_live: bool
    job: Job | None
    training_file: File | None
    validation_file: File | None


def ancestry(session: Session, project_id: str, model: ResolvedModel) -> list[Ancestor]:
    """Return the trainings that led to a model, its own first; empty for a base model.

    It ends: a job goes on from what existed before it.
    """
    found = []
    result = model.adapter
    while result is not None:
        job, is_live = _maker(session, project_id, result.name)
        found.append(
            Ancestor(
                name=result.name,
                digest=result.digest,
                is_live=is_live,
                job=job,
                training_file=_file(session, job.training_file if job else None),
                validation_file=_file(session, job.validation_file if job else None),
            )
        )
        result = TrainingSpec.model_validate(job.spec).init_adapter if job else None
    return found


def _maker(session: Session, project_id: str, name: str) -> tuple[Job | None, bool]:
    """Return the job that made an adapter or a checkpoint, and whether that is still there."""
    adapter = session.get(Adapter, name)
    if adapter is not None and adapter.project_id == project_id:
        made_by = None if adapter.job_id is None else session.get_one(Job, adapter.job_id)
        return made_by, adapter.deleted_at is None
    job = session.scalar(
        select(Job)
        .join(Checkpoint, Checkpoint.job_id == Job.id)
        .where(Checkpoint.name == name, Job.project_id == project_id)
    )
    return job, job is not None


def _file(session: Session, file_id: str | None) -> File | None:
    return None if file_id is None else session.get(File, file_id)


def successors(session: Session, project_id: str, model: ResolvedModel) -> Sequence[Job]:
    """Return the jobs that went on from a model, newest first, at most `MAX_SUCCESSORS`."""
    return session.scalars(
        select(Job)
        .where(
            Job.project_id == project_id,
            Job.base_model == model.base_model,
            Job.spec[("init_adapter", "name")].as_string() == model.name,
        )
        .order_by(Job.created_at.desc(), Job.id.desc())
        .limit(MAX_SUCCESSORS)
    ).all()
