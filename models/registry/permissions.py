"""Permissions: a project lets another one call exactly one adapter or checkpoint."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from models.errors import InvalidRequestError, NotFoundError
from models.registry.page import Cursor, Page, page
from models.tables import Adapter, CheckpointPermission, Project, new_id


def grant(
    session: Session, owner_id: str, model: str, project_ids: Sequence[str]
) -> list[CheckpointPermission]:
    """Let projects call a model of `owner_id`; one that may already keeps its permission.

    Raises:
        NotFoundError: there is no such project.
        InvalidRequestError: it is the owner itself.
    """
    granted = []
    # Made in one moment, they are listed by their identifiers: in the order asked for.
    ids = sorted(new_id("cp_") for _ in project_ids)
    for at, project_id in enumerate(dict.fromkeys(project_ids)):
        if project_id == owner_id:
            raise InvalidRequestError(
                "A project may call its own models without a permission.",
                param=f"project_ids[{at}]",
            )
        if session.get(Project, project_id) is None:
            raise NotFoundError(f"No such project: {project_id!r}.", param=f"project_ids[{at}]")
        before = session.scalar(select(CheckpointPermission).where(*_is(model, project_id)))
        permission = before or CheckpointPermission(
            id=ids[at], model=model, owner_id=owner_id, project_id=project_id
        )
        session.add(permission)
        granted.append(permission)
    session.flush()
    return granted


def list_page(
    session: Session, owner_id: str, model: str, cursor: Cursor, project_id: str | None = None
) -> Page[CheckpointPermission]:
    query = select(CheckpointPermission).where(
        CheckpointPermission.owner_id == owner_id, CheckpointPermission.model == model
    )
    if project_id is not None:
        query = query.where(CheckpointPermission.project_id == project_id)
    keys = (CheckpointPermission.created_at, CheckpointPermission.id)
    return page(session, query, CheckpointPermission, keys, cursor)


def revoke(session: Session, owner_id: str, model: str, permission_id: str) -> None:
    """Take a permission back; raises `NotFoundError` if it is none of this model's."""
    permission = session.get(CheckpointPermission, permission_id)
    if permission is None or (permission.owner_id, permission.model) != (owner_id, model):
        raise NotFoundError(
            f"No permission of {model!r} has the id {permission_id!r}.", param="permission_id"
        )
    session.execute(
        sql_delete(CheckpointPermission).where(CheckpointPermission.id == permission_id)
    )


def may_call(session: Session, project_id: str, model: str) -> bool:
    """Say whether another project has let this one call a model."""
    found = select(CheckpointPermission.id).where(*_is(model, project_id)).limit(1)
    return session.scalar(found) is not None


def adapters_for(session: Session, project_id: str) -> Sequence[Adapter]:
    """Return the adapters of other projects that this one may call, newest first."""
    return session.scalars(
        select(Adapter)
        .join(CheckpointPermission, CheckpointPermission.model == Adapter.name)
        .where(
            CheckpointPermission.project_id == project_id,
            Adapter.deleted_at.is_(None),
            Adapter.archived_at.is_(None),
        )
        .order_by(Adapter.created_at.desc(), Adapter.name)
    ).all()


def _is(model: str, project_id: str) -> tuple[ColumnElement[bool], ...]:
    return CheckpointPermission.model == model, CheckpointPermission.project_id == project_id
