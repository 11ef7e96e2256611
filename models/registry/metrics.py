"""Metrics: one row for each optimizer step; a step that is redone after a resume is overwritten."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from models.domain.reports import StepMetrics
from models.registry import events
from models.tables import Metric


def record(
    session: Session, job_id: str, attempt: int, points: Sequence[StepMetrics], total_steps: int
) -> None:
    """Store the metrics of some steps and the events that OpenAI's clients read them from."""
    for point in points:
        values = point.model_dump(exclude_none=True)
        session.merge(Metric(job_id=job_id, step=point.step, attempt=attempt, values=values))
        parts = [f"training loss={point.train_loss:.2f}"]
        if point.valid_loss is not None:
            parts.append(f"validation loss={point.valid_loss:.2f}")
        if point.full_valid_loss is not None:
            parts.append(f"full validation loss={point.full_valid_loss:.2f}")
        message = f"Step {point.step}/{total_steps}: {', '.join(parts)}"
        events.append(session, job_id, message, data=values | {"total_steps": total_steps})


def all_points(session: Session, job_id: str) -> list[StepMetrics]:
    rows = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step))
    return [StepMetrics.model_validate(row.values) for row in rows]
