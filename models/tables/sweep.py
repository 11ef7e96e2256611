"""Sweeps: groups of jobs that differ in the fields of a grid."""

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.base import JsonObject
from models.tables.base import Base, Created


class Sweep(Created, Base):
    """`job` is the body that all jobs share, `grid` the values of each field that varies."""

    __tablename__ = "sweeps"
    __table_args__ = (Index("ix_sweeps_list", "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str | None]
    job: Mapped[JsonObject]
    grid: Mapped[JsonObject]


class SweepJob(Base):
    """One job of a sweep; `point` has the value of each field of the grid."""

    __tablename__ = "sweep_jobs"

    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    point: Mapped[JsonObject]
