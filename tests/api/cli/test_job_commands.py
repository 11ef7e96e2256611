"""``tunery jobs``: what is printed of a job."""

import threading

from models.db import Database
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import job_logs, job_runs, jobs, tenancy
from tests.api.cli.conftest import Tunery

SPEC = TrainingSpec(
    model="base", training_file="file-x", seed=1, objective={"type": "sft"}, peft={"type": "lora"}
)


def test_a_log_is_printed_and_followed_to_its_end(tunery: Tunery, database: Database) -> None:
    with database.write() as session:
        job = jobs.create(session, tenancy.default_project(session).id, SPEC, None)
        jobs.move(session, job.id, JobStatus.QUEUED)
        assert job_runs.claim(session, "worker", 30) is not None
        job_logs.append(session, job.id, 1, "[one] äß\n", 1000)
    assert tunery("jobs", "log", job.id) == "[one] äß\n"

    def end() -> None:
        with database.write() as session:
            job_logs.append(session, job.id, 1, "two\n", 1000)
            job_runs.fail(session, job.id, 1, "x", "It failed.")
            job_runs.end_attempt(session, job.id, 1, "failed", 3)

    later = threading.Timer(0.3, end)
    later.start()
    assert tunery("jobs", "log", job.id, "-f") == "[one] äß\ntwo\n"
    later.join()
    assert "ftjob-x" in tunery("jobs", "log", "ftjob-x", status=1)
