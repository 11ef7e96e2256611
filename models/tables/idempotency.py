"""Answers that a repeated request gets once more."""

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base, Created


class IdempotencyKey(Created, Base):
    """A client's name for one request; `status` is None until the request is answered.

    `request_sha256` tells a repetition from another request under the same name.
    """

    __tablename__ = "idempotency_keys"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    status: Mapped[int | None]
    content_type: Mapped[str | None]
    body: Mapped[bytes | None]
