"""Chat completions that their caller asked to keep; they stay until they are deleted."""

from sqlalchemy import delete as sql_delete
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models.domain.base import JsonObject
from models.errors import NotFoundError
from models.registry.page import Cursor, Page, page
from models.tables import StoredCompletion


def create(session: Session, stored: StoredCompletion) -> None:
    session.add(stored)
    session.flush()


def get(session: Session, project_id: str, completion_id: str) -> StoredCompletion:
    """Return a stored completion of this project, or raise `NotFoundError`."""
    stored = session.scalar(
        select(StoredCompletion).where(
            StoredCompletion.id == completion_id, StoredCompletion.project_id == project_id
        )
    )
    if stored is None:
        raise NotFoundError(
            f"No stored chat completion has the id {completion_id!r}; only those made with "
            "'store': true are kept.",
            param="completion_id",
            code="completion_not_found",
        )
    return stored


def list_page(
    session: Session,
    project_id: str,
    cursor: Cursor,
    *,
    model: str | None = None,
    metadata: dict[str, str] | None = None,
) -> Page[StoredCompletion]:
    """Return stored completions: all, those of a model, those whose metadata holds all pairs."""
    query = select(StoredCompletion).where(StoredCompletion.project_id == project_id)
    if model is not None:
        query = query.where(StoredCompletion.model == model)
    for key, value in (metadata or {}).items():
        query = query.where(StoredCompletion.request_metadata[key].as_string() == value)
    keys = (StoredCompletion.created_at, StoredCompletion.id)
    return page(session, query, StoredCompletion, keys, cursor)


def change_metadata(
    session: Session, stored: StoredCompletion, metadata: JsonObject | None
) -> StoredCompletion:
    session.execute(
        update(StoredCompletion)
        .where(StoredCompletion.id == stored.id)
        .values(request_metadata=metadata)
    )
    session.refresh(stored)
    return stored


def delete(session: Session, project_id: str, completion_id: str) -> None:
    stored = get(session, project_id, completion_id)
    session.execute(sql_delete(StoredCompletion).where(StoredCompletion.id == stored.id))
