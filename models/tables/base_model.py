"""Base models that may be trained and called."""

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base, Created


class BaseModel(Created, Base):
    """A name of the operator's catalog; a process that materialises it fills in the identity."""

    __tablename__ = "base_models"

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    fingerprint: Mapped[str | None]
    config_sha256: Mapped[str | None]
    weights_sha256: Mapped[str | None]
    vocab_size: Mapped[int | None]
    n_parameters: Mapped[int | None] = mapped_column(BigInteger)
    max_length: Mapped[int | None]
    retired: Mapped[bool] = mapped_column(default=False)
