"""``/v1/audit_logs``: who changed what in the project."""

from typing import Annotated

from fastapi import APIRouter, Query

from api import bodies
from api.deps import After, CallerDep, ReadSession
from models.domain.base import JsonObject
from models.registry import audit
from models.registry.page import Cursor
from models.tables import AuditLog

router = APIRouter(prefix="/audit_logs", tags=["keys"])

Types = Annotated[list[str], Query(alias="event_types[]", max_length=50, default_factory=list)]
Actors = Annotated[list[str], Query(alias="actor_ids[]", max_length=50, default_factory=list)]


@router.get("")
def list_audit_logs(
    session: ReadSession,
    caller: CallerDep,
    event_types: Types,
    actor_ids: Actors,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JsonObject:
    """List the changes that keys of the project made, newest first, by type or by key."""
    cursor = Cursor(after, limit)
    page = audit.list_page(session, caller.project_id, cursor, types=event_types, key_ids=actor_ids)
    return bodies.list_body(page, _entry_body)


def _entry_body(entry: AuditLog) -> JsonObject:
    """Return OpenAI's form: what was changed stands under the name of the type."""
    actor: JsonObject = {"type": "operator"}
    if entry.key_id is not None:
        actor = {"type": "api_key", "api_key": {"id": entry.key_id, "type": "user"}}
    return {
        "id": entry.id,
        "object": "audit_log",
        "type": entry.type,
        "effective_at": int(entry.created_at),
        "actor": actor,
        "project": {"id": entry.project_id},
        "request_id": entry.request_id,
        entry.type: {"id": entry.object_id, "data": entry.details or {}},
    }
