"""Adapters: publishing, resolving a name to content, deleting a name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.generation import AdapterRef
from models.errors import InvalidRequestError, NotFoundError
from models.registry import permissions
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


@dataclass(frozen=True, slots=True)
class _Owned:
    """A fine-tuned model with its owner, whoever asks."""

    project_id: str
    model: ResolvedModel
    is_archived: bool = False
    is_merged: bool = False

    def to_call(self) -> ResolvedModel:
        """Return the model with how its owner wants it answered, which callers alone are told."""
        if self.model.adapter is None or not self.is_merged:
            return self.model
        adapter = self.model.adapter.model_copy(update={"merged": True})
        return replace(self.model, adapter=adapter)


def resolve(session: Session, project_id: str, name: str) -> ResolvedModel:
    """Turn a model name into base and adapter, once for a request, for calling it.

    Names of base models, of published adapters and of checkpoints are one namespace. A model of
    another project is found if that has given leave (see ``permissions``); its job is not told.

    Raises:
        NotFoundError: nothing that this project may call has the name; never the base in its stead.
    """
    if (base := _base(session, name)) is not None:
        return base
    owned = _owned(session, name)
    if owned is not None and not owned.is_archived:
        if owned.project_id == project_id:
            return owned.to_call()
        if permissions.may_call(session, project_id, name):
            return replace(owned.to_call(), job_id=None)
    raise _unknown(name)


def resolve_own(session: Session, project_id: str, name: str) -> ResolvedModel:
    """Like `resolve`, for what an owner alone may do; an archived model is found too.

    Its reference is the content alone, as jobs keep it: how it is answered is not part of it.
    """
    if (base := _base(session, name)) is not None:
        return base
    owned = _owned(session, name)
    if owned is None or owned.project_id != project_id:
        raise _unknown(name)
    return owned.model


def _base(session: Session, name: str) -> ResolvedModel | None:
    base = None if name.startswith("ft:") else session.get(BaseModel, name)
    if base is None or base.retired:
        return None
    return ResolvedModel(name, base.name, None, base.created_at)


def _owned(session: Session, name: str) -> _Owned | None:
    adapter = session.get(Adapter, name)
    if adapter is not None and adapter.deleted_at is None:
        is_archived = adapter.archived_at is not None
        return _Owned(adapter.project_id, _of_adapter(adapter), is_archived, adapter.merged)
    row = session.execute(
        select(Checkpoint, Job)
        .join(Job, Checkpoint.job_id == Job.id)
        .where(Checkpoint.name == name)
    ).first()
    if row is None:
        return None
    checkpoint, job = row
    reference = AdapterRef(
        name=name,
        digest=checkpoint.adapter_digest,
        base_model=job.base_model,
        base_fingerprint=checkpoint.base_fingerprint,
    )
    model = ResolvedModel(name, job.base_model, reference, checkpoint.created_at, job.id)
    return _Owned(job.project_id, model)


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(
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
    """Return the adapters of a project that can be called, newest first."""
    return session.scalars(
        select(Adapter)
        .where(
            Adapter.project_id == project_id,
            Adapter.deleted_at.is_(None),
            Adapter.archived_at.is_(None),
        )
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
    adapter = get_own(session, project_id, name, "deleted", "model_not_deletable")
    session.execute(
        update(Adapter)
        .where(Adapter.name == name, Adapter.deleted_at.is_(None))
        .values(deleted_at=db_now())
    )
    return None if is_referenced(session, adapter.digest) else adapter.digest


def set_archived(session: Session, project_id: str, name: str, *, archived: bool) -> Adapter:
    """Take an adapter out of use without losing it, or put it back; twice is no error.

    Raises:
        NotFoundError: there is no such model in this project.
        InvalidRequestError: the name is that of a base model or of a checkpoint.
    """
    adapter = get_own(session, project_id, name, "archived", "model_not_archivable")
    is_now = Adapter.archived_at.is_(None) if archived else Adapter.archived_at.is_not(None)
    session.execute(
        update(Adapter)
        .where(Adapter.name == name, is_now)
        .values(archived_at=db_now() if archived else None)
    )
    session.refresh(adapter)
    return adapter


def set_merged(session: Session, name: str, *, merged: bool) -> None:
    """Have an adapter, which was looked up, answered by a merged copy of its base, or not."""
    session.execute(update(Adapter).where(Adapter.name == name).values(merged=merged))


def get_own(session: Session, project_id: str, name: str, what_for: str, code: str) -> Adapter:
    """Return a published adapter of this project.

    Raises:
        NotFoundError: there is no such model in this project.
        InvalidRequestError: it is a base model or a checkpoint, which are not to be `what_for`
            (``code``).
    """
    resolved = resolve_own(session, project_id, name)
    adapter = session.get(Adapter, name)
    if resolved.adapter is None or adapter is None:
        raise InvalidRequestError(
            f"{name!r} is not a fine-tuned model; only those can be {what_for}.",
            param="model",
            code=code,
        )
    return adapter


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
