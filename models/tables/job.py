"""Training jobs, their attempts, their events."""

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.base import JsonObject
from models.domain.status import JobStatus
from models.tables.base import Base, Created, Listed


class Job(Listed, Base):
    """The truth about one fine-tuning job.

    `attempt` is the fencing token: it grows with every claim, and a write of an older attempt
    affects no row. `spec` is a dumped ``TrainingSpec``; `estimate` and `measured` are an
    ``Estimate`` and a ``Measured``. Until it ends, a job holds its reservations of the project's
    quotas.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_claim", "status", "priority", "created_at"),
        Index("ix_jobs_list", "project_id", "created_at", "id"),
        Index("ix_jobs_project", "project_id", "status"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str | None]
    status: Mapped[str] = mapped_column(default=JobStatus.VALIDATING_FILES)
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"), index=True)
    training_file: Mapped[str] = mapped_column(index=True)
    validation_file: Mapped[str | None] = mapped_column(index=True)
    spec: Mapped[JsonObject]
    request_metadata: Mapped[JsonObject | None]
    priority: Mapped[int] = mapped_column(default=0)

    attempt: Mapped[int] = mapped_column(default=0)
    fruitless_attempts: Mapped[int] = mapped_column(default=0)
    checkpoint_step_at_claim: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False)

    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    reserved_tokens: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    reserved_device_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    estimated_finish: Mapped[float | None]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    fine_tuned_model: Mapped[str | None]
    result_file: Mapped[str | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_param: Mapped[str | None]
    estimate: Mapped[JsonObject | None]
    measured: Mapped[JsonObject | None]


class JobAttempt(Base):
    """One claim of a job by one worker, and how it ended."""

    __tablename__ = "job_attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]
    trainer_pid: Mapped[int | None]
    started_at: Mapped[float]
    ended_at: Mapped[float | None] = mapped_column(index=True)
    exit_code: Mapped[int | None]
    outcome: Mapped[str | None]


class Event(Created, Base):
    """What happened to a job, append-only; `sequence` counts from 1 without gaps."""

    __tablename__ = "events"
    __table_args__ = (
        UniqueConstraint("job_id", "sequence"),
        Index("ix_events_messages", "job_id", "type", "sequence"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    sequence: Mapped[int]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[JsonObject | None]


class JobLogPart(Base):
    """Whole lines of what the trainers of a job wrote to standard error, in order.

    `start` and `n_bytes` count bytes of the whole log in UTF-8; the oldest parts go when it grows.
    """

    __tablename__ = "job_log_parts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    n_bytes: Mapped[int]
    attempt: Mapped[int]
    text: Mapped[str]
