"""What a job produces: metrics, checkpoints, the adapter."""

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.base import JsonObject
from models.tables.base import Base, Created, Listed


class Metric(Base):
    """The metrics of one optimizer step; `attempt` tells which run of the step counts.

    `is_judged` says that the whole validation split was scored after it.
    """

    __tablename__ = "metrics"
    __table_args__ = (Index("ix_metrics_judged", "job_id", "is_judged", "step"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    is_judged: Mapped[bool] = mapped_column(default=False)
    values: Mapped[JsonObject]


class Checkpoint(Created, Base):
    """A complete object set under `object_prefix`, and its adapter by digest."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    step: Mapped[int]
    name: Mapped[str] = mapped_column(unique=True)
    object_prefix: Mapped[str]
    adapter_digest: Mapped[str]
    base_fingerprint: Mapped[str]
    metrics: Mapped[JsonObject]


class Adapter(Listed, Base):
    """A published adapter: the alias `name` for the immutable content `digest`.

    One that came from outside has no job. One that is archived is kept and cannot be called.
    `merged` says that its owner wants it answered by a merged copy of the base.
    """

    __tablename__ = "adapters"
    __table_args__ = (Index("ix_adapters_list", "project_id", "created_at", "name"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), unique=True)
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    digest: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    manifest: Mapped[JsonObject]
    merged: Mapped[bool] = mapped_column(default=False)
    archived_at: Mapped[float | None]
    deleted_at: Mapped[float | None]
