"""Adapters: publishing, resolving a name to content, deleting a name."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.generation import AdapterRef
from models.errors import InvalidRequestError, NotFoundError
from models.registry.page import Cursor, Page, page
from models.tables import Adapter, BaseModel, Checkpoint, Job, new_id


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What a model name stands for at this moment: a base, and an adapter or none."""

    name: str
    base_model: str
    adapter: AdapterRef | None
    created_at: float
    job_id: str | None = None


def new_name(base_model: str, organization: str, suffix: str) -> str:
    """Return ``ft:{base}:{organization}:{suffix}:{id}``; an empty suffix leaves ``::``."""
    return f"ft:{base_model}:{organization}:{suffix}:{new_id('', 8)}"


def publish(session: Session, adapter: Adapter) -> None:
    session.add(adapter)
    session.flush()


def resolve(session: Session, project_id: str, name: str) -> ResolvedModel:
    """Turn a model name into base and adapter, once for a request.

    Names of base models, of published adapters and of checkpoints are one namespace.

    Raises:
        NotFoundError: nothing of this project has the name; never the base in its stead.
    """
    if not name.startswith("ft:"):
        base = session.get(BaseModel, name)
        if base is not None and not base.retired:
            return ResolvedModel(name, base.name, None, base.created_at)
    adapter = session.get(Adapter, name)
    if adapter is not None and adapter.project_id == project_id and adapter.deleted_at is None:
        return _of_adapter(adapter)
    row = session.execute(
        select(Checkpoint, Job)
        .join(Job, Checkpoint.job_id == Job.id)
        .where(Checkpoint.name == name, Job.project_id == project_id)
    ).first()
    if row is not None:
        checkpoint, job = row
        reference = AdapterRef(
            name=name,
            digest=checkpoint.adapter_digest,
            base_model=job.base_model,
            base_fingerprint=checkpoint.base_fingerprint,
        )
        return ResolvedModel(name, job.base_model, reference, checkpoint.created_at, job.id)
    raise NotFoundError(
        f"The model {name!r} does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def _of_adapter(adapter: Adapter) -> ResolvedModel:
    reference = AdapterRef(
        name=adapter.name,
        digest=adapter.digest,
        base_model=adapter.base_model,
        base_fingerprint=adapter.manifest["base_fingerprint"],
    )
    return ResolvedModel(
        adapter.name, adapter.base_model, reference, adapter.created_at, adapter.job_id
    )


def live(session: Session, project_id: str) -> Sequence[Adapter]:
    return session.scalars(
        select(Adapter)
        .where(Adapter.project_id == project_id, Adapter.deleted_at.is_(None))
        .order_by(Adapter.created_at.desc(), Adapter.name)
    ).all()


def list_page(
    session: Session,
    project_id: str,
    cursor: Cursor,
    *,
    base_model: str | None = None,
    text: str = "",
) -> Page[Adapter]:
    """Return published adapters, newest first unless the cursor says otherwise."""
    query = select(Adapter).where(Adapter.project_id == project_id, Adapter.deleted_at.is_(None))
    if base_model is not None:
        query = query.where(Adapter.base_model == base_model)
    if text:
        query = query.where(Adapter.name.icontains(text, autoescape=True))
    return page(session, query, Adapter, (Adapter.created_at, Adapter.name), cursor)


def count_by_base(session: Session, project_id: str) -> dict[str, int]:
    """Return how many published adapters there are on each base model that has any."""
    rows = session.execute(
        select(Adapter.base_model, func.count())
        .where(Adapter.project_id == project_id, Adapter.deleted_at.is_(None))
        .group_by(Adapter.base_model)
    )
    return {name: count for name, count in rows}  # noqa: C416 (rows, not pairs)


def step_of(session: Session, name: str) -> int:
    """Return the step whose weights an adapter or a checkpoint that was resolved holds."""
    adapter = session.get(Adapter, name)
    if adapter is not None:
        return int(adapter.manifest["step"])
    return session.scalars(select(Checkpoint.step).where(Checkpoint.name == name)).one()


def delete(session: Session, project_id: str, name: str) -> str | None:
    """Retire an adapter's name; return its digest if no live name stands for the content any more.

    Raises:
        NotFoundError: there is no such model in this project.
        InvalidRequestError: the name is that of a base model or of a checkpoint.
    """
    resolved = resolve(session, project_id, name)
    adapter = session.get(Adapter, name)
    if resolved.adapter is None or adapter is None:
        raise InvalidRequestError(
            f"{name!r} is not a fine-tuned model; only those can be deleted.",
            param="model",
            code="model_not_deletable",
        )
    session.execute(
        update(Adapter)
        .where(Adapter.name == name, Adapter.deleted_at.is_(None))
        .values(deleted_at=db_now())
    )
    return None if is_referenced(session, adapter.digest) else adapter.digest


def is_referenced(session: Session, digest: str) -> bool:
    """Say whether a live adapter or a checkpoint still stands for this content."""
    n_adapters = session.scalar(
        select(func.count())
        .select_from(Adapter)
        .where(Adapter.digest == digest, Adapter.deleted_at.is_(None))
    )
    n_checkpoints = session.scalar(
        select(func.count()).select_from(Checkpoint).where(Checkpoint.adapter_digest == digest)
    )
    return bool(n_adapters or n_checkpoints)
