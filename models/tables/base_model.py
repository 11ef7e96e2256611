"""Base models that may be trained and called."""

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.base import JsonObject
from models.tables.base import Base, Created


class BaseModel(Created, Base):
    """A name of the operator's catalog; a process that materialises it fills in the identity.

    `shape` is a dumped ``BaseShape``.
    """

    __tablename__ = "base_models"

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    fingerprint: Mapped[str | None]
    config_sha256: Mapped[str | None]
    weights_sha256: Mapped[str | None]
    vocab_size: Mapped[int | None]
    n_parameters: Mapped[int | None] = mapped_column(BigInteger)
    max_length: Mapped[int | None]
    shape: Mapped[JsonObject | None]
    retired: Mapped[bool] = mapped_column(default=False)


class BaseProbe(Created, Base):
    """Measurements of one base model in one precision, or the wish for them.

    `values` is a dumped ``Probe``, absent until a worker has measured; `claimed_until` keeps others
    from measuring the same meanwhile, `failure` says why it cannot be measured.
    """

    __tablename__ = "base_probes"

    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"), primary_key=True)
    precision: Mapped[str] = mapped_column(primary_key=True)
    values: Mapped[JsonObject | None]
    claimed_until: Mapped[float | None]
    failure: Mapped[str | None]
