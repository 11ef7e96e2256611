"""Projects and API keys."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.access import Scope, allows
from models.domain.limits import KeyRates, ProjectLimits
from models.errors import AuthenticationError, InvalidRequestError, NotFoundError
from models.tables import ApiKey, Organization, Project, new_id

DEFAULT_PROJECT = "default"
KEY_PREFIX = "sk-tunery-"
SHOWN_CHARACTERS = len(KEY_PREFIX) + 4


def default_project(session: Session) -> Project:
    """Return the project that exists from the first start on, creating it when it is missing."""
    project = session.scalar(select(Project).where(Project.name == DEFAULT_PROJECT))
    if project is None:
        project = Project(id=new_id("proj_"), name=DEFAULT_PROJECT)
        session.add(project)
        session.flush()
    return project


def create_project(session: Session, name: str, organization: str | None = None) -> Project:
    """Add a project, and its organisation if that is new.

    Raises:
        InvalidRequestError: there is one of this name.
    """
    if session.scalar(select(Project.id).where(Project.name == name)) is not None:
        raise InvalidRequestError(
            f"There is a project named {name!r} already. Choose another name.",
            param="name",
            code="project_exists",
        )
    owner = None if organization is None else _organization(session, organization)
    project = Project(id=new_id("proj_"), name=name, organization_id=owner and owner.id)
    session.add(project)
    session.flush()
    return project


def _organization(session: Session, name: str) -> Organization:
    found = session.scalar(select(Organization).where(Organization.name == name))
    if found is None:
        found = Organization(id=new_id("org_"), name=name)
        session.add(found)
        session.flush()
    return found


def organization_names(session: Session) -> dict[str, str]:
    """Return the names of all organisations by their ids."""
    return {each.id: each.name for each in session.scalars(select(Organization))}


def limits_of(project: Project) -> ProjectLimits:
    return ProjectLimits.model_validate(
        {name: getattr(project, name) for name in ProjectLimits.model_fields}
    )


def set_limits(session: Session, project: Project, limits: ProjectLimits) -> None:
    """Change those limits that were given; what is used already stays."""
    for name in limits.model_fields_set:
        setattr(project, name, getattr(limits, name))
    session.flush()


def get_project(session: Session, project_id: str) -> Project:
    """Return a project by its id, or raise `NotFoundError`."""
    project = session.get(Project, project_id)
    if project is None:
        raise NotFoundError(f"No such project: {project_id!r}.", param="project_id")
    return project


def project_named(session: Session, name: str) -> Project:
    """Return a project by its name, or raise `NotFoundError` with the names there are."""
    project = session.scalar(select(Project).where(Project.name == name))
    if project is None:
        names = ", ".join(project.name for project in list_projects(session))
        raise NotFoundError(f"No project is named {name!r}. Projects: {names}.", param="project")
    return project


def list_projects(session: Session) -> Sequence[Project]:
    """Return all projects, oldest first."""
    return session.scalars(select(Project).order_by(Project.created_at, Project.id)).all()


def is_operator(project: Project, scopes: Iterable[str]) -> bool:
    """Say whether a key speaks for the service: an admin key of the very first project."""
    return project.name == DEFAULT_PROJECT and allows(scopes, Scope.ADMIN)


def within_reach(session: Session, project_id: str, scopes: Iterable[str]) -> Sequence[Project]:
    """Return the projects that a key may see, oldest first.

    They are all for the operator's key, those of its organisation for a key with that scope, else
    the key's own project.

    Args:
        session: The caller's.
        project_id: The key's project.
        scopes: What the key may do.
    """
    own = get_project(session, project_id)
    scopes = tuple(scopes)
    if is_operator(own, scopes):
        return list_projects(session)
    if own.organization_id is None or not allows(scopes, Scope.ORGANIZATION):
        return [own]
    return session.scalars(
        select(Project)
        .where(Project.organization_id == own.organization_id)
        .order_by(Project.created_at, Project.id)
    ).all()


def create_key(
    session: Session,
    project_id: str,
    name: str,
    scopes: Sequence[Scope] = (Scope.ADMIN,),
    expires_at: float | None = None,
    rates: KeyRates = KeyRates(),  # noqa: B008 (immutable)
) -> tuple[ApiKey, str]:
    """Make a key; return its row and the secret, which is shown this once and never stored.

    Args:
        session: The caller's.
        project_id: Its project.
        name: For people.
        scopes: What it may do.
        expires_at: When it ends, in seconds since 1970; None is never.
        rates: Its own limits.

    Raises:
        InvalidRequestError: no scope is given, the end is not in the future, or the scope
            ``organization`` is given in a project without one.
    """
    if not scopes:
        raise InvalidRequestError(
            f"A key needs a scope: one or more of {', '.join(Scope)}.", param="scopes"
        )
    if expires_at is not None and expires_at <= (session.scalar(select(db_now())) or 0.0):
        raise InvalidRequestError(
            "'expires_at' is past; give a time in the future, in seconds since 1970.",
            param="expires_at",
        )
    if Scope.ORGANIZATION in scopes and get_project(session, project_id).organization_id is None:
        raise InvalidRequestError(
            "The project belongs to no organisation, so no key can administer it. Leave out the "
            "scope 'organization', or use a project of the organisation.",
            param="scopes",
        )
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        prefix=secret[:SHOWN_CHARACTERS],
        scopes=list(dict.fromkeys(scopes)),
        expires_at=expires_at,
        secret_sha256=_hash(secret),
        **rates.model_dump(),
    )
    session.add(key)
    session.flush()
    return key, secret


def authenticate(session: Session, secret: str) -> ApiKey:
    """Return the key of a bearer secret; `AuthenticationError` is the same for every cause."""
    digest = _hash(secret)
    key = session.scalar(select(ApiKey).where(ApiKey.secret_sha256 == digest, *_active()))
    if key is None or not hmac.compare_digest(key.secret_sha256, digest):
        raise AuthenticationError(
            "Incorrect API key provided. Make one with 'tunery key create', or use the one in the "
            "file 'key' of the service's home directory."
        )
    return key


def active_key(session: Session, key_id: str) -> ApiKey | None:
    """Return a key that is neither revoked nor expired, by its id."""
    return session.scalar(select(ApiKey).where(ApiKey.id == key_id, *_active()))


def _active() -> tuple[ColumnElement[bool], ...]:
    unexpired = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > db_now())
    return ApiKey.revoked_at.is_(None), unexpired


def list_keys(session: Session, project_id: str | None = None) -> Sequence[ApiKey]:
    """Return the keys of a project, or of all, oldest first."""
    query = select(ApiKey).order_by(ApiKey.created_at)
    if project_id is not None:
        query = query.where(ApiKey.project_id == project_id)
    return session.scalars(query).all()


def revoke_key(session: Session, key_id: str, project_id: str | None = None) -> ApiKey:
    """Make a key (of a project, if given) useless from now on; revoking twice is no error.

    Raises:
        NotFoundError: there is no such key.
    """
    key = session.get(ApiKey, key_id)
    if key is None or project_id not in (None, key.project_id):
        raise NotFoundError(f"No key has the id {key_id!r}.", param="id")
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=db_now())
    )
    session.refresh(key)
    return key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
