"""Merged models: an adapter and its base as one set of weights."""

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base, Created


class Merge(Created, Base):
    """The wish for a merged model, and at its end the file that holds it.

    `claimed_until` keeps other workers from making the same meanwhile; `error` says why it failed.
    """

    __tablename__ = "merges"
    __table_args__ = (Index("ix_merges_model", "project_id", "model"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    model: Mapped[str] = mapped_column(ForeignKey("adapters.name"))
    status: Mapped[str]
    claimed_until: Mapped[float | None]
    file_id: Mapped[str | None]
    error: Mapped[str | None]
