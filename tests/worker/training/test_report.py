"""How progress becomes rows: seldom, in order, and only while the lease holds."""

import time

import pytest

from models.domain.reports import StepMetrics
from models.errors import LeaseLostError
from tests.worker.training.service import Service
from worker.training.report import DatabaseReporter
from worker.training.task import Progress


def point(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        epoch=1.0,
        train_loss=2.0,
        train_mean_token_accuracy=0.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=10,
        trained_tokens=5,
        tokens_per_second=100.0,
    )


def report(reporter: DatabaseReporter, step: int) -> None:
    reporter.step(point(step), Progress(step=step, n_tokens=10 * step), 10)


def test_the_first_step_is_seen_at_once_and_the_next_ones_together(service: Service) -> None:
    job = service.submit()
    reporter = DatabaseReporter(service.database, job.id, job.attempt, flush_seconds=60)
    for step in (1, 2, 3):
        report(reporter, step)
    assert [p.step for p in service.trace(job.id)] == [1]
    reporter.flush()
    trace = service.trace(job.id)
    assert [p.step for p in trace] == [1, 2, 3]
    times = [p.recorded_at or 0 for p in trace]
    assert times == sorted(times)
    assert 0 <= time.time() - times[0] < 3600
    row = service.job(job.id)
    assert (row.step, row.total_steps, row.trained_tokens) == (3, 10, 30)
    reporter.flush()
    assert [p.step for p in service.trace(job.id)] == [1, 2, 3]


def test_the_end_is_estimated_from_the_pace_so_far(service: Service) -> None:
    job = service.submit()
    reporter = DatabaseReporter(service.database, job.id, job.attempt, flush_seconds=0)
    report(reporter, 1)
    assert service.job(job.id).estimated_finish is None
    time.sleep(0.1)
    report(reporter, 2)
    estimate = service.job(job.id).estimated_finish
    assert estimate is not None
    assert estimate - time.time() > 0.5  # eight more steps of at least 0.1 s, less this check


def test_an_old_attempt_cannot_report(service: Service) -> None:
    job = service.submit()
    service.requeue(job)
    reporter = DatabaseReporter(service.database, job.id, job.attempt)
    with pytest.raises(LeaseLostError):
        report(reporter, 1)
    with pytest.raises(LeaseLostError):
        reporter.warn("too late")
    assert service.trace(job.id) == []
