"""``/v1/projects``: the caller's project, those of its organisation, or for the operator all.

A key with the scope ``organization`` sees and makes projects of its organisation, and their keys.
The operator is an admin key of the default project, and alone sets limits.
"""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy.orm import Session

from api import bodies
from api.audit import note, note_in
from api.deps import Caller, CallerDep, ReadSession, ServicesDep, WriteSession
from api.strict_json import StrictJsonRoute
from models.db import after_commit
from models.domain.access import Scope, allows
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
    """List the projects that the key can see: its own, those of its organisation, or all."""
    found = tenancy.within_reach(session, caller.project_id, caller.scopes)
    names = tenancy.organization_names(session)
    data = [project_body(project, names) for project in found]
    return {"object": "list", "data": data, "has_more": False}


@router.get("/{project_id}")
def retrieve_project(project_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    """Show a project, its limits and what of them is in use."""
    project = visible(session, caller, project_id)
    body = project_body(project, tenancy.organization_names(session))
    return body | {"in_use": asdict(quotas.in_use(session, project.id))}


@router.post("")
def create_project(body: ProjectCreate, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Make a project and its first admin key, whose secret is in this answer and never again.

    Only a key of the default project, or one with the scope ``organization``, can do this. The
    latter makes projects of its organisation, with the limits of its own project.
    """
    own = tenancy.get_project(session, caller.project_id)
    organization, limits = body.organization, body.limits
    if not tenancy.is_operator(own, caller.scopes):
        organization, limits = _of_organization(session, caller, own, body)
    project = tenancy.create_project(session, body.name, organization)
    tenancy.set_limits(session, project, limits)
    key, secret = tenancy.create_key(session, project.id, "first key")
    note(session, caller, "project.created", project.id, name=project.name)
    note_in(session, caller, project.id, ("api_key.created", key.id), name=key.name)
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
    project = visible(session, caller, project_id)
    own = tenancy.get_project(session, caller.project_id)
    if not tenancy.is_operator(own, caller.scopes):
        raise PermissionDeniedError("Only an admin key of the default project can change limits.")
    tenancy.set_limits(session, project, body.limits)
    after_commit(session, "forget callers", services.callers.forget)
    changed = body.limits.model_dump(exclude_unset=True)
    note_in(session, caller, project.id, ("project.updated", project.id), limits=changed)
    return project_body(project, tenancy.organization_names(session))


def _of_organization(
    session: Session, caller: Caller, own: Project, body: ProjectCreate
) -> tuple[str, ProjectLimits]:
    """Return organisation and limits of a project that an organisation's key makes.

    Raises:
        PermissionDeniedError: it is no such key, or asks for another organisation or for limits.
    """
    if own.organization_id is None or not allows(caller.scopes, Scope.ORGANIZATION):
        raise PermissionDeniedError(
            "Only an admin key of the default project, or a key with the scope 'organization', can "
            "make projects."
        )
    name = tenancy.organization_names(session)[own.organization_id]
    if body.organization not in (None, name):
        raise PermissionDeniedError(f"This key makes projects of {name!r} only.")
    if body.limits.model_fields_set:
        raise PermissionDeniedError("Only an admin key of the default project can set limits.")
    return name, tenancy.limits_of(own)


def visible(session: Session, caller: Caller, project_id: str) -> Project:
    """Return a project that the caller can see; raises `NotFoundError` for any other."""
    for project in tenancy.within_reach(session, caller.project_id, caller.scopes):
        if project.id == project_id:
            return project
    raise NotFoundError(f"No such project: {project_id!r}.", param="project_id")


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
