"""Organisations, their projects, the projects' keys, and what is shared or done with them."""

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from models.domain.base import JsonObject
from models.tables.base import Base, Created, Listed


class Organization(Created, Base):
    """Projects that belong together."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Rates:
    """Most requests and tokens in a minute; None leaves it to what stands above."""

    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]


class Project(Rates, Created, Base):
    """Who owns files, jobs, adapters and keys; a limit that is None does not bind.

    `share` is the project's weight when projects compete for workers. The rates are those of each
    of its keys that has none of its own.
    """

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    organization_id: Mapped[str | None] = mapped_column(ForeignKey("organizations.id"))
    share: Mapped[float] = mapped_column(default=1.0, server_default="1")
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_waiting_jobs: Mapped[int | None]
    max_running_jobs: Mapped[int | None]
    tokens_per_day: Mapped[int | None] = mapped_column(BigInteger)
    device_hours_per_month: Mapped[float | None]


class ApiKey(Rates, Created, Base):
    """A bearer key: only its sha256 is stored; the prefix lets people tell keys apart.

    `scopes` are values of ``models.domain.access.Scope``; a key without `expires_at` has no end.
    """

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    # Read with the key in one query: every request asks for both.
    project: Mapped[Project] = relationship(lazy="joined", innerjoin=True, viewonly=True)


class CheckpointPermission(Created, Base):
    """Leave for another project to call exactly one adapter or checkpoint, `model`."""

    __tablename__ = "checkpoint_permissions"
    __table_args__ = (UniqueConstraint("model", "project_id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    owner_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))


class AuditLog(Listed, Base):
    """One change that somebody made, written in the same transaction as the change.

    `key_id` is None for what the operator did from the command line.
    """

    __tablename__ = "audit_logs"
    __table_args__ = (Index("ix_audit_logs_list", "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str | None]
    request_id: Mapped[str | None]
    type: Mapped[str]
    object_id: Mapped[str]
    details: Mapped[JsonObject | None]
