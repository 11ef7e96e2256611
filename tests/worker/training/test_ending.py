"""Which errors end a job, and what is left for another attempt."""

import errno
from typing import Any

import pytest
import torch

from models.errors import InvalidRequestError, LeaseLostError, UnavailableError
from tests.worker.training.service import Service
from worker.training import exit_codes
from worker.training.ending import UNEXPECTED, end_by, failure_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage_full"),
        (InvalidRequestError("x", code="bad_row"), "bad_row"),
        (UnavailableError("the base model is not installed"), "service_unavailable"),
        (UnavailableError("x", code="object_store_unavailable"), None),
        (RuntimeError("surprise"), None),
        (ConnectionResetError(), None),
    ],
)
def test_errors_end_the_job_only_where_another_attempt_would_meet_them_again(
    error: Any, code: str | None
) -> None:
    failure = failure_of(error)
    assert (failure.code if failure else None) == code


def test_an_error_fails_the_job_of_the_attempt_that_owns_it(service: Service) -> None:
    job = service.submit()
    error = InvalidRequestError("Row 3 is odd.", code="bad_row")
    lost = end_by(error, service.database, job.id, job.attempt + 1)
    assert (lost, service.job(job.id).status) == (exit_codes.LEASE_LOST, "running")
    surprise = end_by(RuntimeError("surprise"), service.database, job.id, job.attempt)
    assert (surprise, service.job(job.id).status) == (UNEXPECTED, "running")
    gone = end_by(LeaseLostError("gone"), service.database, job.id, job.attempt)
    assert (gone, service.job(job.id).status) == (exit_codes.LEASE_LOST, "running")
    assert end_by(error, service.database, job.id, job.attempt) == exit_codes.FAILED
    assert service.job(job.id).error_code == "bad_row"
