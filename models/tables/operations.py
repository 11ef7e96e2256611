"""What the people who run a service look at: its workers, and what was used."""

from typing import Any

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base, Created


class Worker(Created, Base):
    """A worker process that trains; gone when its lease runs out.

    `devices` are dumped ``Device``s; memory is in bytes: the machine's, what of it is free, and
    what the worker holds together with its trainers. A draining worker takes no new job.
    """

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    version: Mapped[str]
    slots: Mapped[int]
    devices: Mapped[list[dict[str, Any]]]
    memory_total: Mapped[int] = mapped_column(BigInteger)
    memory_available: Mapped[int] = mapped_column(BigInteger)
    memory_used: Mapped[int] = mapped_column(BigInteger)
    draining: Mapped[bool] = mapped_column(default=False)
    seen_at: Mapped[float]
    lease_until: Mapped[float]


class Usage(Base):
    """What one key used of one model on one day (UTC, counted from 1970-01-01).

    `key_id` is empty for jobs that came without a key. Of training, `model` is the base model.
    """

    __tablename__ = "usage"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[int] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger, default=0)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    completion_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    device_seconds: Mapped[float] = mapped_column(default=0.0)
