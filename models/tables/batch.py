"""Batches of requests, and the answers that have come so far."""

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.base import JsonObject
from models.domain.status import BatchStatus
from models.tables.base import Base, Created


class Batch(Created, Base):
    """A file of requests that run in the background.

    `attempt` is the fencing token of the process that runs it, as for jobs. `errors` is a list of
    objects with code, message, param and line.
    """

    __tablename__ = "batches"
    __table_args__ = (Index("ix_batches_list", "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str]
    endpoint: Mapped[str]
    model: Mapped[str | None]
    input_file_id: Mapped[str] = mapped_column(index=True)
    completion_window: Mapped[str]
    status: Mapped[str] = mapped_column(default=BatchStatus.VALIDATING, index=True)
    request_metadata: Mapped[JsonObject | None]
    errors: Mapped[JsonObject | None]

    attempt: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[float | None]

    n_total: Mapped[int] = mapped_column(default=0)
    n_completed: Mapped[int] = mapped_column(default=0)
    n_failed: Mapped[int] = mapped_column(default=0)
    input_tokens: Mapped[int] = mapped_column(default=0)
    output_tokens: Mapped[int] = mapped_column(default=0)
    output_file_id: Mapped[str | None]
    error_file_id: Mapped[str | None]

    expires_at: Mapped[float]
    in_progress_at: Mapped[float | None]
    finalizing_at: Mapped[float | None]
    completed_at: Mapped[float | None]
    failed_at: Mapped[float | None]
    expired_at: Mapped[float | None]
    cancelling_at: Mapped[float | None]
    cancelled_at: Mapped[float | None]


class BatchResult(Base):
    """The answer to one line of a batch; gone once it stands in the batch's files.

    `output` is a line of the output file if `failed` is false, else one of the error file.
    """

    __tablename__ = "batch_results"

    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    failed: Mapped[bool]
    output: Mapped[JsonObject]
