"""``/v1/projects``: the caller's project; the operator's own also makes and limits others."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy.orm import Session

from api import bodies
from api.access import is_operator
from api.audit import note
from api.deps import Caller, CallerDep, ReadSession, ServicesDep, WriteSession
from api.strict_json import StrictJsonRoute
from models.db import after_commit
from models.domain.base import JsonObject, Parameters, Text
from models.domain.limits import ProjectLimits
from models.errors import NotFoundError, PermissionDeniedError
from models.registry import quotas, tenancy
from models.tables import Project

router = APIRouter(prefix="/projects", tags=["projects"], route_class=StrictJsonRoute)

Name = Annotated[Text, Field(min_length=1, max_length=100)]


class ProjectCreate(Parameters):
    """The body of ``POST /projects``."""

    name: Name
    organization: Name | None = None
    limits: ProjectLimits = ProjectLimits()


class ProjectUpdate(Parameters):
    """The body of ``POST /projects/{project_id}``; limits that are not named stay."""

    limits: ProjectLimits


@router.get("")
def list_projects(session: ReadSession, caller: CallerDep) -> JsonObject:
    """List the project of the key, the only one it can see; the operator's key sees all."""
    found = [tenancy.get_project(session, caller.project_id)]
    if is_operator(session, caller.project_id):
        found = list(tenancy.list_projects(session))
    names = tenancy.organization_names(session)
    data = [project_body(project, names) for project in found]
    return {"object": "list", "data": data, "has_more": False}


@router.get("/{project_id}")
def retrieve_project(project_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    """Show a project, its limits and what of them is in use."""
    project = _visible(session, caller, project_id)
    body = project_body(project, tenancy.organization_names(session))
    return body | {"in_use": asdict(quotas.in_use(session, project.id))}


@router.post("")
def create_project(body: ProjectCreate, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Make a project and its first admin key, whose secret is in this answer and never again.

    Only a key of the default project can do this.
    """
    if not is_operator(session, caller.project_id):
        raise PermissionDeniedError("Only an admin key of the default project can make projects.")
    project = tenancy.create_project(session, body.name, body.organization)
    tenancy.set_limits(session, project, body.limits)
    key, secret = tenancy.create_key(session, project.id, "first key")
    note(session, caller, "project.created", project.id, name=project.name)
    made = project_body(project, tenancy.organization_names(session))
    return made | {"api_key": bodies.key_body(key) | {"value": secret}}


@router.post("/{project_id}")
def update_project(
    project_id: str,
    body: ProjectUpdate,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
) -> JsonObject:
    """Change limits of a project. Only a key of the default project can do this."""
    project = _visible(session, caller, project_id)
    if not is_operator(session, caller.project_id):
        raise PermissionDeniedError("Only an admin key of the default project can change limits.")
    tenancy.set_limits(session, project, body.limits)
    after_commit(session, "forget callers", services.callers.forget)
    changed = body.limits.model_dump(exclude_unset=True)
    note(session, caller, "project.updated", project.id, limits=changed)
    return project_body(project, tenancy.organization_names(session))


def _visible(session: Session, caller: Caller, project_id: str) -> Project:
    if project_id != caller.project_id and not is_operator(session, caller.project_id):
        raise NotFoundError(f"No such project: {project_id!r}.", param="project_id")
    return tenancy.get_project(session, project_id)


def project_body(project: Project, organization_names: dict[str, str]) -> JsonObject:
    owner = project.organization_id
    return {
        "id": project.id,
        "object": "project",
        "name": project.name,
        "organization": None if owner is None else organization_names[owner],
        "created_at": int(project.created_at),
        "limits": tenancy.limits_of(project).model_dump(),
    }
