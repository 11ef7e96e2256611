"""Usage adds up by day, key and model, whoever writes it at the same time."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from models.db import Database, db_now
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import base_models, job_runs, jobs, tenancy, usage
from models.registry.usage import Used, User
from models.tables import File, JobAttempt


def test_concurrent_amounts_add_up(database: Database) -> None:
    with database.write() as session:
        project = tenancy.default_project(session).id
    first, second = User(project, "key_a", "base"), User(project, None, "base")

    def write(n: int) -> None:
        with database.write() as session:
            amounts = [(first, Used(requests=1, prompt_tokens=n)), (second, Used(trained_tokens=2))]
            usage.add(session, amounts if n % 2 else reversed(amounts))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(20)))
    with database.read() as session:
        day = usage.today(session)
        rows = usage.by_day(session, [project], day - 1, day)
        found = [(row.key_id, row.requests, row.prompt_tokens, row.trained_tokens) for row in rows]
        assert found == [("", 0, 0, 40), ("key_a", 20, 190, 0)]
        assert usage.by_day(session, [project], day + 1, day + 2) == []
        assert usage.total(session, project, day).tokens == 230
        assert usage.total(session, "proj_none", day) == Used()


def test_jobs_that_share_a_trainer_share_its_time(database: Database) -> None:
    """One has it alone for 40 s, then 40 s with another, then 20 s alone; a third is elsewhere."""
    seconds = {"long": (100, None), "short": (60, 20), "elsewhere": (90, None)}
    ids = {}
    with database.write() as session:
        owner = tenancy.default_project(session).id
        base_models.sync_catalog(session, {"base": "path:/nowhere"})
        file = File(
            id="file-1",
            project_id=owner,
            purpose="fine-tune",
            filename="rows.jsonl",
            bytes=1,
            sha256="0" * 64,
            object_key="files/1",
            status="processed",
        )
        session.add(file)
        session.flush()
        spec = TrainingSpec(
            model="base",
            training_file=file.id,
            seed=1,
            objective={"type": "sft"},
            peft={"type": "lora"},
        )
        for _ in seconds:
            job = jobs.create(session, owner, spec, None)
            jobs.move(session, job.id, JobStatus.QUEUED)
        for name, (began, ended) in seconds.items():
            claimed = job_runs.claim(session, "worker", 600)
            assert claimed is not None
            ids[name] = claimed.id
            job_runs.record_trainer(session, claimed.id, 1, 7 if name != "elsewhere" else 8)
            times = {"started_at": db_now() - began}
            if ended is not None:
                times["ended_at"] = db_now() - ended
            attempt = update(JobAttempt).where(JobAttempt.job_id == claimed.id)
            session.execute(attempt.values(times))

    def used() -> float:
        with database.read() as session:
            return usage.total(session, owner, usage.today(session)).device_seconds

    for name, expected in (("long", 80), ("elsewhere", 80 + 90)):
        with database.write() as session:
            job_runs.end_attempt(session, ids[name], 1, "succeeded", 0)
        assert used() == pytest.approx(expected, abs=3)
