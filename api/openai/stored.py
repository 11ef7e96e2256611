"""Chat completions with ``store: true``: kept, listed, labelled, deleted."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request

from api import bodies
from api.deps import After, Caller, CallerDep, ReadSession, WriteSession
from api.openai.filters import metadata_filter
from api.openai.schemas import ChatRequest, Metadata
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject, Parameters
from models.errors import InvalidRequestError
from models.registry import stored_completions
from models.registry.page import Cursor
from models.tables import StoredCompletion

router = APIRouter(prefix="/chat/completions", tags=["chat"], route_class=StrictJsonRoute)

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


def _cursor(after: After = None, limit: Limit = 20, order: Order = "asc") -> Cursor:
    return Cursor(after, limit, order)


CursorDep = Annotated[Cursor, Depends(_cursor)]


class StoredUpdate(Parameters):
    """The body of ``POST /chat/completions/{id}``."""

    metadata: Metadata | None


def keep(services: Services, caller: Caller, body: ChatRequest, completion: JsonObject) -> None:
    """Keep a completion and the request that it answers."""
    with services.database.write() as session:
        stored_completions.create(
            session,
            StoredCompletion(
                id=completion["id"],
                project_id=caller.project_id,
                model=body.model,
                request=body.model_dump(mode="json", exclude_none=True),
                completion=completion,
                request_metadata=body.metadata or None,
            ),
        )


def _stored_body(stored: StoredCompletion) -> JsonObject:
    return {**stored.completion, "metadata": stored.request_metadata}


@router.get("")
def list_stored(
    request: Request,
    session: ReadSession,
    caller: CallerDep,
    cursor: CursorDep,
    model: str | None = None,
) -> JsonObject:
    """List the stored completions, optionally of one model or by ``metadata[key]=value``."""
    metadata, _ = metadata_filter(request)
    page = stored_completions.list_page(
        session, caller.project_id, cursor, model=model, metadata=metadata
    )
    return bodies.list_body(page, _stored_body)


@router.get("/{completion_id}")
def retrieve_stored(completion_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    return _stored_body(stored_completions.get(session, caller.project_id, completion_id))


@router.post("/{completion_id}")
def update_stored(
    completion_id: str, body: StoredUpdate, session: WriteSession, caller: CallerDep
) -> JsonObject:
    """Change the metadata; nothing else of a completion can change."""
    stored = stored_completions.get(session, caller.project_id, completion_id)
    return _stored_body(stored_completions.change_metadata(session, stored, body.metadata))


@router.delete("/{completion_id}")
def delete_stored(completion_id: str, session: WriteSession, caller: CallerDep) -> JsonObject:
    stored_completions.delete(session, caller.project_id, completion_id)
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}


@router.get("/{completion_id}/messages")
def list_messages(
    completion_id: str,
    session: ReadSession,
    caller: CallerDep,
    cursor: CursorDep,
) -> JsonObject:
    """List the messages that a stored completion answers."""
    stored = stored_completions.get(session, caller.project_id, completion_id)
    data = [
        {"id": f"{completion_id}-{number}", "content_parts": None, "content": None, **message}
        for number, message in enumerate(stored.request["messages"])
    ]
    if cursor.order == "desc":
        data.reverse()
    start = 0
    if cursor.after is not None:
        ids = [message["id"] for message in data]
        if cursor.after not in ids:
            raise InvalidRequestError(
                f"'after' is {cursor.after!r}, which is no item of this list.", param="after"
            )
        start = ids.index(cursor.after) + 1
    shown = data[start : start + cursor.limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + cursor.limit < len(data),
    }
