"""``/v1/models``: base models and published adapters. Names may hold slashes, hence ``:path``."""

from fastapi import APIRouter

from api import actions, bodies
from api.deps import CallerDep, ReadSession, ServicesDep, WriteSession
from models.domain.base import JsonObject
from models.registry import adapters, base_models, permissions

router = APIRouter(prefix="/models", tags=["models"])


@router.get("")
def list_models(session: ReadSession, caller: CallerDep) -> JsonObject:
    """List base models, the project's adapters, and those that other projects let it call."""
    data = [bodies.base_model_body(model) for model in base_models.active(session)]
    data += [bodies.adapter_body(row) for row in adapters.live(session, caller.project_id)]
    lent = permissions.adapters_for(session, caller.project_id)
    data += [bodies.adapter_body(row) | {"owned_by": None, "job_id": None} for row in lent]
    return {"object": "list", "data": data}


@router.get("/{model:path}")
def retrieve_model(model: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    resolved = adapters.resolve(session, caller.project_id, model)
    return bodies.resolved_body(resolved, caller.project_id)


@router.delete("/{model:path}")
def delete_model(
    model: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    actions.delete_model(session, services, caller, model)
    return {"id": model, "object": "model", "deleted": True}
