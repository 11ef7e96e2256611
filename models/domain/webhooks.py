"""Events that a project can have sent to it."""

from typing import Literal, get_args

from models.domain.status import BatchStatus, JobStatus

WebhookEventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
]

EVENT_TYPES: tuple[WebhookEventType, ...] = get_args(WebhookEventType)


def job_event(status: JobStatus) -> WebhookEventType | None:
    """Return the event of a job that has come to `status`, or None where nobody is told."""
    return _named(f"fine_tuning.job.{status}")


def batch_event(status: BatchStatus) -> WebhookEventType | None:
    """Return the event of a batch that has come to `status`, or None where nobody is told."""
    return _named(f"batch.{status}")


def _named(name: str) -> WebhookEventType | None:
    return next((each for each in EVENT_TYPES if each == name), None)


RETRY_SECONDS = (5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 24 * 3600)
"""How long to wait after each failed attempt; after the last one a delivery is given up."""


def retry_delay(attempts: int) -> float | None:
    """Return the seconds until the next try after `attempts` failed ones; None gives up."""
    return RETRY_SECONDS[attempts - 1] if attempts <= len(RETRY_SECONDS) else None
