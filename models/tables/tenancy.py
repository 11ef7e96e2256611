"""Projects and their keys."""

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base, Created


class Project(Created, Base):
    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


class ApiKey(Created, Base):
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
