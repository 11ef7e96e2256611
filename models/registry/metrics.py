"""Metrics: one row for each optimizer step; a step that is redone after a resume is overwritten."""

from collections.abc import Sequence

from sqlalchemy import bindparam, func, select, union
from sqlalchemy.orm import Session, aliased

from models.domain.reports import StepMetrics
from models.prepared import PreparedRows
from models.registry import events
from models.tables import Job, Metric

_after = PreparedRows(
    Metric,
    select(Metric)
    .where(Metric.job_id == bindparam("job_id"), Metric.step > bindparam("after"))
    .order_by(Metric.step)
    .limit(bindparam("limit")),
)


def record(
    session: Session, job_id: str, attempt: int, points: Sequence[StepMetrics], total_steps: int
) -> None:
    """Store the metrics of some steps and the events that OpenAI's clients read them from."""
    for point in points:
        values = point.model_dump(exclude_none=True)
        session.merge(
            Metric(
                job_id=job_id,
                step=point.step,
                attempt=attempt,
                is_judged=point.full_valid_loss is not None,
                values=values,
            )
        )
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
    rows = _after.all(session, job_id=job_id, after=step, limit=limit)
    return [StepMetrics.model_validate(row.values) for row in rows]


def sample(
    session: Session, job_id: str, after_step: int, max_points: int, until_step: int | None = None
) -> tuple[list[StepMetrics], int]:
    """Return at most about `max_points` steps of a range, evenly spaced, and how many there are.

    The last step and those with a validation loss are always among them.

    Args:
        session: The caller's.
        job_id: The job.
        after_step: The range begins after this step.
        max_points: Most that are wanted.
        until_step: The last step of the range; None is the job's.
    """
    of_job = [Metric.job_id == job_id, Metric.step > after_step]
    if until_step is not None:
        of_job.append(Metric.step <= until_step)
    n_all = session.scalar(select(func.count()).select_from(Metric).where(*of_job)) or 0
    query = select(Metric).where(*of_job).order_by(Metric.step)
    if n_all > max_points:
        every = -(-n_all // max_points)
        steps = union(
            select(Metric.step).where(*of_job, Metric.step % every == 0),
            select(Metric.step).where(*of_job, Metric.is_judged),
            select(func.max(Metric.step)).where(*of_job),
        )
        query = query.where(Metric.step.in_(steps))
    rows = session.scalars(query)
    return [StepMetrics.model_validate(row.values) for row in rows], n_all


def at(session: Session, job_id: str, step: int) -> StepMetrics | None:
    row = session.get(Metric, (job_id, step))
    return None if row is None else StepMetrics.model_validate(row.values)


def latest(session: Session, job_ids: Sequence[str]) -> dict[str, StepMetrics]:
    """Return the metrics of the newest step of each job that has any."""
    of_job = aliased(Metric)
    # For each job one look at the end of the primary key, however many steps it has.
    newest = select(func.max(of_job.step)).where(of_job.job_id == Job.id).scalar_subquery()
    rows = session.scalars(
        select(Metric)
        .join(Job, Metric.job_id == Job.id)
        .where(Job.id.in_(job_ids), Metric.step == newest)
    )
    return {row.job_id: StepMetrics.model_validate(row.values) for row in rows}
