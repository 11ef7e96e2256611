"""Measurements are wished for once, made by one worker, and corrected by the jobs that end."""

import pytest
from sqlalchemy import update

from models.db import Database, db_now
from models.domain.estimates import Measured, Probe
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import job_runs, jobs, probes, tenancy
from models.tables import BaseProbe

PROBE = Probe(
    device="CPU",
    n_adapter=1,
    token_budget=1,
    fixed_bytes=1,
    token_bytes=1.0,
    square_bytes=0.0,
    batch_seconds=1.0,
    token_seconds=1.0,
    square_seconds=0.0,
    trained_seconds=1.0,
    update_seconds=1.0,
    forward_share=0.3,
    start_seconds=1.0,
)


def want(database: Database) -> None:
    with database.write() as session:
        probes.want(session, "base", "nf4")


def claim(database: Database) -> BaseProbe | None:
    with database.write() as session:
        return probes.claim(session, 60)


def stored(database: Database) -> BaseProbe:
    with database.read() as session:
        row = probes.get(session, "base", "nf4")
        assert row is not None
        return row


def test_a_wish_is_taken_once_and_fulfilled(database: Database) -> None:
    assert claim(database) is None
    want(database)
    want(database)
    row = claim(database)
    assert row is not None
    assert claim(database) is None
    with database.write() as session:
        probes.record(session, row, PROBE)
    assert Probe.model_validate(stored(database).values) == PROBE
    assert claim(database) is None


def test_a_wish_whose_worker_was_lost_or_had_a_job_is_taken_again(database: Database) -> None:
    want(database)
    row = claim(database)
    assert row is not None
    with database.write() as session:
        probes.give_back(session, row)
    assert claim(database) is not None
    with database.write() as session:
        session.execute(update(BaseProbe).values(claimed_until=db_now() - 1))
    assert claim(database) is not None


def test_what_cannot_be_measured_is_not_tried_again(database: Database) -> None:
    want(database)
    row = claim(database)
    assert row is not None
    with database.write() as session:
        probes.record_failure(session, row, "It is damaged.")
    assert claim(database) is None
    assert stored(database).failure == "It is damaged."


def test_only_jobs_on_the_same_base_precision_and_device_correct(database: Database) -> None:
    def measured(device: str, precision: str, factor: float) -> Measured:
        return Measured(
            device=device,
            precision=precision,
            peak_bytes=round(100 * factor),
            seconds=12.0,
            train_seconds=10 * factor,
            reckoned_peak_bytes=100,
            reckoned_train_seconds=10.0,
        )

    for each in (
        measured("CPU", "nf4", 1.1),
        measured("GPU", "nf4", 5),
        measured("CPU", "bf16", 7),
    ):
        with database.write() as session:
            spec = TrainingSpec(
                model="base", training_file="f", seed=1, objective={}, peft={"type": "lora"}
            )
            job = jobs.create(session, tenancy.default_project(session).id, spec, None)
            jobs.move(session, job.id, JobStatus.QUEUED)
            claimed = job_runs.claim(session, "w", 60)
            assert claimed is not None
            job_runs.record_measured(session, job.id, 1, each)
            job_runs.succeed(session, job.id, 1, fine_tuned_model="ft:x")
    with database.read() as session:
        found = probes.corrections(session, "base", "nf4", "CPU")
    assert found.n_jobs == 1
    assert found.memory == pytest.approx(1.1 ** (1 / 3))
