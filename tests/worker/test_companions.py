"""Which queued jobs a worker takes beside another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from models.db import Database
from models.domain.limits import ProjectLimits
from models.domain.reports import DatasetReport
from models.domain.status import FileStatus, JobStatus
from models.domain.training import TrainingSpec
from models.registry import base_models, job_runs, jobs, tenancy
from models.settings import DatabaseSettings, WorkerSettings
from models.tables import Base, File, Job, JobAttempt
from worker import companions
from worker.training import methods, objectives


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(DatabaseSettings(url=f"sqlite:///{tmp_path / 'tunery.db'}"))
    Base.metadata.create_all(made.engine)
    with made.write() as session:
        base_models.sync_catalog(session, {"base": "path:/nowhere"})
    yield made
    made.close()


def project(database: Database, name: str, **limits: float) -> str:
    with database.write() as session:
        made = tenancy.create_project(session, name)
        tenancy.set_limits(session, made, ProjectLimits.model_validate(limits))
        return made.id


def queue(database: Database, owner: str, *, n_bytes: int = 4000, **changes: Any) -> str:
    """Add a queued job over ten rows of `n_bytes` in all, by default 100 tokens each."""
    fields: dict[str, Any] = {
        "model": "base",
        "seed": 1,
        "hyperparameters": {"n_epochs": 1, "batch_size": 2},
        "objective": objectives.parse_params({"type": "sft"}).model_dump(),
        "peft": methods.parse_params({"type": "lora"}).model_dump(),
        "precision": {"type": "nf4"},
    }
    report = DatasetReport(n_rows=10, n_valid_rows=10)
    with database.write() as session:
        file = File(
            id=f"file-{session.query(File).count()}",
            project_id=owner,
            purpose="fine-tune",
            filename="rows.jsonl",
            bytes=n_bytes,
            sha256="",
            object_key="",
            status=FileStatus.PROCESSED,
            report=report.model_dump(),
        )
        session.add(file)
        session.flush()
        spec = TrainingSpec.model_validate({**fields, "training_file": file.id, **changes})
        job = jobs.create(session, owner, spec, None)
        jobs.move(session, job.id, JobStatus.QUEUED)
        return job.id


def claim(database: Database, joint_jobs: int = 4) -> list[str]:
    """Take a job and its company; return their ids."""
    settings = WorkerSettings(joint_jobs=joint_jobs)
    with database.write() as session:
        first = job_runs.claim(session, "worker", 30)
        assert first is not None
        return [first.id, *(job.id for job in companions.claim(session, first, settings, "cpu"))]


def lora(**changes: Any) -> dict[str, Any]:
    return methods.parse_params({"type": "lora", **changes}).model_dump()


def test_a_job_alone_in_the_queue_stays_alone(database: Database) -> None:
    job = queue(database, project(database, "one"))
    assert claim(database) == [job]


def test_small_jobs_of_all_projects_come_along_in_turn_up_to_the_limit(database: Database) -> None:
    one, other = project(database, "one"), project(database, "other")
    first, second = queue(database, one), queue(database, one, peft=lora(r=4))
    third, fourth = queue(database, other), queue(database, other)
    left = queue(database, one)
    assert set(claim(database)) == {first, second, third, fourth}
    with database.read() as session:
        rows = session.query(JobAttempt).all()
        assert {(row.attempt, row.worker) for row in rows} == {(1, "worker")}
        assert session.get_one(Job, second).status == JobStatus.RUNNING
        assert session.get_one(Job, second).lease_until is not None
    assert claim(database) == [left]


def test_the_setting_keeps_every_job_alone(database: Database) -> None:
    owner = project(database, "one")
    first, second = queue(database, owner), queue(database, owner)
    assert claim(database, joint_jobs=1) == [first]
    assert claim(database, joint_jobs=1) == [second]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": {"type": "bf16"}},
        {"precision": {"type": "nf4", "double_quant": False}},
        {"peft": lora(use_dora=True)},
        {"peft": lora(init="pissa")},
        {"peft": methods.parse_params({"type": "ia3"}).model_dump()},
        {"objective": objectives.parse_params({"type": "dpo"}).model_dump()},
        {"num_devices": 2},
        {"packing": False},
        {"n_bytes": 40_000},
        {"hyperparameters": {"n_epochs": 1, "batch_size": 10}},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes),
)
def test_jobs_that_could_not_share_or_gain_are_left(
    database: Database, changes: dict[str, Any]
) -> None:
    owner = project(database, "one")
    small, other = queue(database, owner), queue(database, owner, **changes)
    assert claim(database) == [small]
    assert claim(database) == [other]


def test_a_job_whose_run_was_lost_has_no_company(database: Database) -> None:
    owner = project(database, "one")
    jobs_ = [queue(database, owner) for _ in range(3)]
    with database.write() as session:
        session.execute(update(Job).where(Job.id != jobs_[1]).values(fruitless_attempts=1))
    assert [claim(database) for _ in jobs_] == [[job] for job in jobs_]


def test_a_project_has_no_more_running_jobs_than_it_may(database: Database) -> None:
    owner = project(database, "one", max_running_jobs=2)
    ids = [queue(database, owner) for _ in range(3)]
    assert claim(database) == ids[:2]
