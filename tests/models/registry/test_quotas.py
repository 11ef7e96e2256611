"""Quotas: reserved by what is submitted, given back by what ends, never overdrawn by a race."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.orm import Session

from models.db import Database
from models.domain.limits import ProjectLimits
from models.domain.status import JobStatus
from models.domain.training import Hyperparameters, TrainingSpec
from models.errors import PayloadTooLargeError, QuotaError
from models.registry import files, job_runs, jobs, quotas, tenancy, usage
from models.registry.usage import Used, User
from models.tables import File, Job, Upload

N_BYTES = 4000
TOKENS = N_BYTES // quotas.BYTES_PER_TOKEN * 2


@pytest.fixture
def project(database: Database) -> str:
    with database.write() as session:
        made = tenancy.create_project(session, "team")
        add_file(session, made.id, "file-x", N_BYTES)
        return made.id


def add_file(session: Session, project_id: str, file_id: str, n_bytes: int) -> None:
    file = File(
        id=file_id,
        project_id=project_id,
        purpose="fine-tune",
        filename="rows.jsonl",
        bytes=n_bytes,
        sha256=file_id,
        object_key=file_id,
    )
    files.create(session, file)


def limit(database: Database, project_id: str, **limits: float) -> None:
    with database.write() as session:
        found = tenancy.get_project(session, project_id)
        tenancy.set_limits(session, found, ProjectLimits.model_validate(limits))


def submit(database: Database, project_id: str) -> str:
    spec = TrainingSpec(
        model="base",
        training_file="file-x",
        seed=1,
        hyperparameters=Hyperparameters(n_epochs=2),
        objective={"type": "sft"},
        peft={"type": "lora"},
    )
    with database.write() as session:
        held = quotas.reserve(session, project_id, spec, N_BYTES)
        return jobs.create(session, project_id, spec, None, reserved=held).id


def in_use(database: Database, project_id: str) -> quotas.InUse:
    with database.read() as session:
        return quotas.in_use(session, project_id)


def test_of_many_jobs_at_once_only_those_get_in_for_which_there_is_room(
    database: Database, project: str
) -> None:
    limit(database, project, max_waiting_jobs=2)
    submit(database, project)

    def try_one(_: int) -> bool:
        try:
            submit(database, project)
        except QuotaError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_one, range(24))) == 1
    assert in_use(database, project).waiting_jobs == 2


def test_a_job_reserves_tokens_until_it_ends_and_then_what_it_trained_counts(
    database: Database, project: str
) -> None:
    limit(database, project, tokens_per_day=2 * TOKENS - 1)
    first = submit(database, project)
    assert in_use(database, project).tokens_today == TOKENS
    with pytest.raises(QuotaError, match="tokens"):
        submit(database, project)
    with database.write() as session:
        quotas.check_serving(session, project, 5)
        with pytest.raises(QuotaError, match="midnight"):
            quotas.check_serving(session, project, TOKENS)
        jobs.move(session, first, JobStatus.QUEUED)
        job = job_runs.claim(session, "worker", 30)
        assert job is not None
        job_runs.fence(session, first, 1, trained_tokens=7)
        job_runs.fail(session, first, 1, "code", "message")
    assert in_use(database, project).tokens_today == 7
    second = submit(database, project)
    with database.write() as session:
        jobs.cancel(session, project, second)
    assert in_use(database, project).tokens_today == 7


def test_device_hours_are_reserved_by_how_long_a_token_took_before(
    database: Database, project: str
) -> None:
    limit(database, project, device_hours_per_month=1.5)
    user = User(project, None, "base")
    with database.write() as session:
        usage.add(session, [(user, Used(trained_tokens=TOKENS, device_seconds=1800))])
    job_id = submit(database, project)
    assert in_use(database, project).device_hours_this_month == pytest.approx(1.0)
    submit(database, project)
    with pytest.raises(QuotaError, match="device hours"):
        submit(database, project)
    with database.write() as session:
        assert session.get_one(Job, job_id).reserved_device_seconds == pytest.approx(1800)
        jobs.cancel(session, project, job_id)
    assert in_use(database, project).device_hours_this_month == pytest.approx(1.0)


def test_bytes_of_files_and_of_uploads_that_began_are_limited(
    database: Database, project: str
) -> None:
    with database.read() as session:
        assert quotas.room_for_bytes(session, project) is None
    limit(database, project, max_bytes=N_BYTES + 100)
    with database.write() as session:
        quotas.check_bytes(session, project, 100)
        upload = Upload(
            id="upload_x",
            project_id=project,
            purpose="fine-tune",
            filename="a",
            mime_type="a/b",
            bytes=60,
            expires_at=2.0**40,
        )
        session.add(upload)
        assert quotas.room_for_bytes(session, project) == 40
        with pytest.raises(PayloadTooLargeError, match="40 more bytes") as caught:
            quotas.check_bytes(session, project, 41)
    assert caught.value.code == "quota_exceeded"
