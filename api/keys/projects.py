"""``/v1/projects``: the caller's project; the operator's own also makes others."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from api import bodies
from api.deps import CallerDep, ReadSession, WriteSession
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject, Parameters, Text
from models.errors import NotFoundError, PermissionDeniedError
from models.registry import tenancy

router = APIRouter(prefix="/projects", tags=["projects"], route_class=StrictJsonRoute)


class ProjectCreate(Parameters):
    """The body of ``POST /projects``."""

    name: Annotated[Text, Field(min_length=1, max_length=100)]


@router.get("")
def list_projects(session: ReadSession, caller: CallerDep) -> JsonObject:
    """List the project of the key: nothing of another one is visible."""
    own = tenancy.get_project(session, caller.project_id)
    return {"object": "list", "data": [bodies.project_body(own)], "has_more": False}


@router.get("/{project_id}")
def retrieve_project(project_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    if project_id != caller.project_id:
        raise NotFoundError(f"No such project: {project_id!r}.", param="project_id")
    return bodies.project_body(tenancy.get_project(session, project_id))


@router.post("")
def create_project(body: ProjectCreate, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Make a project and its first admin key, whose secret is in this answer and never again.

    Only a key of the default project can do this.
    """
    if caller.project_id != tenancy.default_project(session).id:
        raise PermissionDeniedError("Only an admin key of the default project can make projects.")
    project = tenancy.create_project(session, body.name)
    key, secret = tenancy.create_key(session, project.id, "first key")
    return bodies.project_body(project) | {"api_key": bodies.key_body(key) | {"value": secret}}
