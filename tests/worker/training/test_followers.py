"""Jobs on two devices, here two processes on one CPU: equal to one, exact, stopped together."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from models.storage import adapter_prefix, fetch_file
from models.tables import Job
from tests.worker.training.service import Service, chat_rows
from tests.worker.training.test_run import trainer, wait_until
from worker.training import exit_codes

TWO: dict[str, Any] = {"num_devices": 2}
NO_DROPOUT = {"type": "lora", "r": 4, "dropout": 0.0}


def train(service: Service, job: Job) -> None:
    with trainer(service, "--job", job.id, "--attempt", str(job.attempt)) as process:
        assert process.wait(120) == exit_codes.DONE


def adapter(service: Service, job: Job, directory: Path) -> dict[str, np.ndarray]:
    (row,) = [row for row in service.adapters() if row.job_id == job.id]
    directory.mkdir()
    path = directory / "adapter_model.safetensors"
    fetch_file(service.store, f"{adapter_prefix(row.digest)}/{path.name}", path)
    return load_file(path)


@contextmanager
def in_training(service: Service, job: Job, step: int) -> Iterator[tuple[Any, psutil.Process]]:
    """A trainer that has done `step` steps, and its follower."""
    with trainer(service, "--job", job.id, "--attempt", str(job.attempt)) as process:
        wait_until(lambda: service.job(job.id).step >= step, 120)
        (follower,) = psutil.Process(process.pid).children()
        yield process, follower


def test_two_processes_train_what_one_does(service: Service, tmp_path: Path) -> None:
    service.upload("file-valid", chat_rows(15)[12:])
    changes = {"peft": NO_DROPOUT, "validation_file": "file-valid"}
    alone = service.submit(**changes)
    assert service.run(alone) == exit_codes.DONE
    together = service.submit(**changes, **TWO)
    train(service, together)
    for one, two in zip(service.trace(alone.id), service.trace(together.id), strict=True):
        assert two.train_loss == pytest.approx(one.train_loss, abs=1e-4)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
        assert two.valid_loss == pytest.approx(one.valid_loss, abs=1e-4)
        assert (two.trained_tokens, two.tokens) == (one.trained_tokens, one.tokens)
    weights, others = (
        adapter(service, alone, tmp_path / "1"),
        adapter(service, together, tmp_path / "2"),
    )
    for name, weight in weights.items():
        np.testing.assert_allclose(others[name], weight, atol=1e-4)


def test_a_killed_job_goes_on_exactly(service: Service) -> None:
    longer = {**TWO, "hyperparameters": {"n_epochs": 8, "batch_size": 4}}
    expected = service.submit(**longer)
    train(service, expected)
    job = service.submit(**longer, checkpoint_steps=1)
    with in_training(service, job, 2) as (process, follower):
        process.kill()
        process.wait()
        wait_until(lambda: not follower.is_running())
    assert service.job(job.id).step < 24
    again = service.requeue(job)
    train(service, again)
    digests = {row.job_id: row.digest for row in service.adapters()}
    assert digests[job.id] == digests[expected.id]


def test_a_follower_that_dies_ends_the_attempt(service: Service) -> None:
    job = service.submit(**TWO, hyperparameters={"n_epochs": 50, "batch_size": 1})
    with in_training(service, job, 2) as (process, follower):
        follower.kill()
        assert process.wait(60) == 1
    assert service.job(job.id).status == "running"  # for its worker to put back


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGTERM, exit_codes.DRAINED), (signal.SIGINT, exit_codes.CANCELLED)],
)
def test_all_stop_at_one_step(service: Service, number: signal.Signals, exit_code: int) -> None:
    job = service.submit(**TWO, hyperparameters={"n_epochs": 50, "batch_size": 1})
    with in_training(service, job, 2) as (process, follower):
        process.send_signal(number)
        assert process.wait(60) == exit_code
        wait_until(lambda: not follower.is_running())
    saved = [row.step for row in service.checkpoints(job.id)]
    if number == signal.SIGTERM:
        assert saved[-1] == service.job(job.id).step


def test_more_devices_than_the_machine_has_are_refused(service: Service) -> None:
    job = service.submit(num_devices=64)
    assert service.run(job) == exit_codes.FAILED
    failed = service.job(job.id)
    assert (failed.error_param, failed.error_code) == ("num_devices", "devices_unavailable")
