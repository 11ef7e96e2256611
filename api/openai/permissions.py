"""``/v1/fine_tuning/checkpoints/{model}/permissions``: letting other projects call one model."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from api import bodies
from api.audit import note
from api.deps import After, CallerDep, ReadSession, WriteSession
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject, Parameters, Text
from models.registry import adapters, permissions
from models.registry.page import Cursor, Page
from models.tables import CheckpointPermission

router = APIRouter(
    prefix="/fine_tuning/checkpoints", tags=["fine-tuning"], route_class=StrictJsonRoute
)


class PermissionsCreate(Parameters):
    """The body of ``POST …/permissions``."""

    project_ids: Annotated[list[Text], Field(min_length=1, max_length=100)]


@router.post("/{model:path}/permissions")
def create_permissions(
    model: str, body: PermissionsCreate, session: WriteSession, caller: CallerDep
) -> JsonObject:
    """Let other projects call this adapter or checkpoint, and nothing else of this project."""
    adapters.resolve_own(session, caller.project_id, model)
    made = permissions.grant(session, caller.project_id, model, body.project_ids)
    for each in made:
        note(
            session,
            caller,
            "checkpoint.permission.created",
            each.id,
            fine_tuned_model_checkpoint=model,
            project_id=each.project_id,
        )
    return bodies.list_body(Page(made, has_more=False), _permission_body)


def _cursor(
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    order: Literal["ascending", "descending"] = "descending",
) -> Cursor:
    return Cursor(after, limit, "asc" if order == "ascending" else "desc")


@router.get("/{model:path}/permissions")
def list_permissions(
    model: str,
    session: ReadSession,
    caller: CallerDep,
    cursor: Annotated[Cursor, Depends(_cursor)],
    project_id: str | None = None,
) -> JsonObject:
    """List which projects may call this model."""
    adapters.resolve_own(session, caller.project_id, model)
    page = permissions.list_page(session, caller.project_id, model, cursor, project_id)
    return bodies.list_body(page, _permission_body)


@router.delete("/{model:path}/permissions/{permission_id}")
def delete_permission(
    model: str, permission_id: str, session: WriteSession, caller: CallerDep
) -> JsonObject:
    """Take a permission back; the other project's next request is answered 404."""
    adapters.resolve_own(session, caller.project_id, model)
    permissions.revoke(session, caller.project_id, model, permission_id)
    note(
        session,
        caller,
        "checkpoint.permission.deleted",
        permission_id,
        fine_tuned_model_checkpoint=model,
    )
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}


def _permission_body(permission: CheckpointPermission) -> JsonObject:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": int(permission.created_at),
        "project_id": permission.project_id,
    }
