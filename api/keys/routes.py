"""``/v1/api_keys``: the keys of the caller's project."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field, StrictInt

from api import bodies
from api.audit import note
from api.deps import CallerDep, ReadSession, ServicesDep, WriteSession
from api.strict_json import StrictJsonRoute
from models.db import after_commit
from models.domain.access import Scope
from models.domain.base import JsonObject, Text
from models.domain.limits import KeyRates
from models.errors import InvalidRequestError
from models.registry import tenancy

MAX_TIME = 2**40

router = APIRouter(prefix="/api_keys", tags=["keys"], route_class=StrictJsonRoute)


class KeyCreate(KeyRates):
    """The body of ``POST /api_keys``."""

    name: Annotated[Text, Field(min_length=1, max_length=100)]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, max_length=len(Scope))] = (
        Scope.ADMIN,
    )
    expires_at: Annotated[StrictInt, Field(ge=0, le=MAX_TIME)] | None = None


@router.get("")
def list_keys(session: ReadSession, caller: CallerDep) -> JsonObject:
    """List the keys of the project, oldest first; of each only how it begins."""
    keys = tenancy.list_keys(session, caller.project_id)
    return {"object": "list", "data": [bodies.key_body(key) for key in keys], "has_more": False}


@router.post("")
def create_key(body: KeyCreate, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Make a key; its secret is in this answer and never again."""
    key, secret = tenancy.create_key(
        session, caller.project_id, body.name, body.scopes, body.expires_at, _rates(body)
    )
    note(session, caller, "api_key.created", key.id, name=key.name, scopes=key.scopes)
    return bodies.key_body(key) | {"value": secret}


def _rates(body: KeyCreate) -> KeyRates:
    return KeyRates(
        requests_per_minute=body.requests_per_minute, tokens_per_minute=body.tokens_per_minute
    )


@router.delete("/{key_id}")
def revoke_key(
    key_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Make a key useless from now on; the one that this call is made with cannot end itself."""
    if key_id == caller.key_id:
        raise InvalidRequestError(
            "A key cannot revoke itself. Use another key.", param="key_id", code="key_in_use"
        )
    key = tenancy.revoke_key(session, key_id, caller.project_id)
    after_commit(session, "forget callers", services.callers.forget)
    note(session, caller, "api_key.deleted", key.id, name=key.name)
    return bodies.key_body(key)
