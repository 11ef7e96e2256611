"""Projects and API keys."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.errors import AuthenticationError, NotFoundError
from models.tables import ApiKey, Project, new_id

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


def create_key(session: Session, project_id: str, name: str) -> tuple[ApiKey, str]:
    """Make a key; return its row and the secret, which is shown this once and never stored."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        prefix=secret[:SHOWN_CHARACTERS],
        secret_sha256=_hash(secret),
    )
    session.add(key)
    session.flush()
    return key, secret


def authenticate(session: Session, secret: str) -> ApiKey:
    """Return the key of a bearer secret; `AuthenticationError` is the same for every cause."""
    digest = _hash(secret)
    key = session.scalar(select(ApiKey).where(ApiKey.secret_sha256 == digest))
    if (
        key is None
        or key.revoked_at is not None
        or not hmac.compare_digest(key.secret_sha256, digest)
    ):
        raise AuthenticationError(
            "Incorrect API key provided. Make one with 'tunery key create', or use the one in the "
            "file 'key' of the service's home directory."
        )
    return key


def active_key(session: Session, key_id: str) -> ApiKey | None:
    """Return a key that is not revoked, by its id."""
    key = session.get(ApiKey, key_id)
    return key if key is not None and key.revoked_at is None else None


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
