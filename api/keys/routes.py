"""``/v1/api_keys``: keys of the caller's project; ``/v1/projects/{id}/api_keys``: of another."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field, StrictInt
from sqlalchemy.orm import Session

from api import bodies
from api.audit import note_in
from api.deps import Caller, CallerDep, ReadSession, ServicesDep, WriteSession
from api.keys.projects import visible
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.db import after_commit
from models.domain.access import Scope, allows
from models.domain.base import JsonObject, Text
from models.domain.limits import KeyRates
from models.errors import InvalidRequestError, PermissionDeniedError
from models.registry import tenancy

MAX_TIME = 2**40

router = APIRouter(tags=["keys"], route_class=StrictJsonRoute)


class KeyCreate(KeyRates):
    """The body of ``POST /api_keys``."""

    name: Annotated[Text, Field(min_length=1, max_length=100)]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, max_length=len(Scope))] = (
        Scope.ADMIN,
    )
    expires_at: Annotated[StrictInt, Field(ge=0, le=MAX_TIME)] | None = None


@router.get("/api_keys")
def list_keys(session: ReadSession, caller: CallerDep) -> JsonObject:
    """List the keys of the project, oldest first; of each only how it begins."""
    return _list(session, caller.project_id)


@router.get("/projects/{project_id}/api_keys")
def list_keys_of_project(project_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    """List the keys of a project that the caller's key can see."""
    return _list(session, visible(session, caller, project_id).id)


@router.post("/api_keys")
def create_key(body: KeyCreate, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Make a key; its secret is in this answer and never again."""
    return _create(session, caller, caller.project_id, body)


@router.post("/projects/{project_id}/api_keys")
def create_key_of_project(
    project_id: str, body: KeyCreate, session: WriteSession, caller: CallerDep
) -> JsonObject:
    """Make a key of a project that the caller's key can see."""
    return _create(session, caller, visible(session, caller, project_id).id, body)


@router.delete("/api_keys/{key_id}")
def revoke_key(
    key_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Make a key useless from now on; the one that this call is made with cannot end itself."""
    return _revoke(session, services, caller, caller.project_id, key_id)


@router.delete("/projects/{project_id}/api_keys/{key_id}")
def revoke_key_of_project(
    project_id: str,
    key_id: str,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
) -> JsonObject:
    """Make a key of a project that the caller's key can see useless from now on."""
    project = visible(session, caller, project_id)
    return _revoke(session, services, caller, project.id, key_id)


def _list(session: Session, project_id: str) -> JsonObject:
    keys = tenancy.list_keys(session, project_id)
    return {"object": "list", "data": [bodies.key_body(key) for key in keys], "has_more": False}


def _create(session: Session, caller: Caller, project_id: str, body: KeyCreate) -> JsonObject:
    own = tenancy.get_project(session, caller.project_id)
    may_grant = allows(caller.scopes, Scope.ORGANIZATION) or tenancy.is_operator(own, caller.scopes)
    if Scope.ORGANIZATION in body.scopes and not may_grant:
        raise PermissionDeniedError(
            "Only a key that has the scope 'organization' itself, or an admin key of the default "
            "project, can give that scope."
        )
    rates = KeyRates(
        requests_per_minute=body.requests_per_minute, tokens_per_minute=body.tokens_per_minute
    )
    key, secret = tenancy.create_key(
        session, project_id, body.name, body.scopes, body.expires_at, rates
    )
    what = ("api_key.created", key.id)
    note_in(session, caller, project_id, what, name=key.name, scopes=key.scopes)
    return bodies.key_body(key) | {"value": secret}


def _revoke(
    session: Session, services: Services, caller: Caller, project_id: str, key_id: str
) -> JsonObject:
    if key_id == caller.key_id:
        raise InvalidRequestError(
            "A key cannot revoke itself. Use another key.", param="key_id", code="key_in_use"
        )
    key = tenancy.revoke_key(session, key_id, project_id)
    after_commit(session, "forget callers", services.callers.forget)
    note_in(session, caller, project_id, ("api_key.deleted", key.id), name=key.name)
    return bodies.key_body(key)
