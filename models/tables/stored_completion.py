"""Chat completions that their caller asked to keep."""

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.base import JsonObject
from models.tables.base import Base, Created


class StoredCompletion(Created, Base):
    """A chat completion with ``store: true``: `completion` as it was answered.

    `request` has the messages it answers and the parameters it was made with.
    """

    __tablename__ = "stored_completions"
    __table_args__ = (Index("ix_stored_completions_list", "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    model: Mapped[str]
    request: Mapped[JsonObject]
    completion: Mapped[JsonObject]
    request_metadata: Mapped[JsonObject | None]
