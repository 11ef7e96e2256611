"""Metrics: one row for each optimizer step; a step that is redone after a resume is overwritten."""

from collections.abc import Sequence

from sqlalchemy import func, or_, select
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


def after(session: Session, job_id: str, step: int, limit: int) -> list[StepMetrics]:
    """Return the metrics of the steps after `step`, in order."""
    rows = session.scalars(
        select(Metric)
        .where(Metric.job_id == job_id, Metric.step > step)
        .order_by(Metric.step)
        .limit(limit)
    )
    return [StepMetrics.model_validate(row.values) for row in rows]


def sample(
    session: Session, job_id: str, after_step: int, max_points: int
) -> tuple[list[StepMetrics], int]:
    """Return at most about `max_points` steps after one, evenly spaced, and how many there are.

    The last step and those with a validation loss are always among them.
    """
    of_job = (Metric.job_id == job_id, Metric.step > after_step)
    n_all = session.scalar(select(func.count()).select_from(Metric).where(*of_job)) or 0
    query = select(Metric).where(*of_job).order_by(Metric.step)
    if n_all > max_points:
        every = -(-n_all // max_points)
        last = select(func.max(Metric.step)).where(Metric.job_id == job_id).scalar_subquery()
        judged = Metric.values["full_valid_loss"].as_float().is_not(None)
        query = query.where(or_(Metric.step % every == 0, Metric.step == last, judged))
    rows = session.scalars(query)
    return [StepMetrics.model_validate(row.values) for row in rows], n_all


def at(session: Session, job_id: str, step: int) -> StepMetrics | None:
    row = session.get(Metric, (job_id, step))
    return None if row is None else StepMetrics.model_validate(row.values)


def latest(session: Session, job_ids: Sequence[str]) -> dict[str, StepMetrics]:
    """Return the metrics of the newest step of each job that has any."""
    newest = (
        select(Metric.job_id, func.max(Metric.step).label("step"))
        .where(Metric.job_id.in_(job_ids))
        .group_by(Metric.job_id)
        .subquery()
    )
    rows = session.scalars(
        select(Metric).join(
            newest, (Metric.job_id == newest.c.job_id) & (Metric.step == newest.c.step)
        )
    )
    return {row.job_id: StepMetrics.model_validate(row.values) for row in rows}
