"""Ownership of jobs, on both databases: claimed once, fenced by the attempt, never lost."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models.db import Database, db_now
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.errors import InvalidRequestError, LeaseLostError, NotFoundError
from models.registry import adapters, events, job_runs, jobs, tenancy
from models.registry.job_files import DataDemand
from models.tables import Event, File, Job, new_id, ordered_id

LOST = job_runs.LostRun("trainer_crashed", "The trainer crashed.")


def queued(database: Database, priority: int = 0) -> str:
    with database.write() as session:
        project = tenancy.default_project(session)
        spec = TrainingSpec(
            model="base",
            training_file="file-x",
            seed=1,
            objective={"type": "sft"},
            peft={"type": "lora"},
            priority=priority,
        )
        job = jobs.create(session, project.id, spec, None)
        jobs.move(session, job.id, JobStatus.QUEUED)
        return job.id


def claim(database: Database) -> Job | None:
    with database.write() as session:
        return job_runs.claim(session, "worker", 30)


def state(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


def test_jobs_are_claimed_by_priority_then_age_and_each_once(database: Database) -> None:
    old, young, urgent = queued(database), queued(database), queued(database, priority=5)
    claimed = [claim(database) for _ in range(4)]
    assert [job and job.id for job in claimed] == [urgent, old, young, None]


def test_sixteen_workers_claim_a_job_exactly_once(database: Database) -> None:
    job_id = queued(database)
    with ThreadPoolExecutor(16) as pool:
        claimed = [job for job in pool.map(lambda _: claim(database), range(16)) if job]
    assert [(job.id, job.attempt) for job in claimed] == [(job_id, 1)]


def expire(database: Database, job_id: str) -> None:
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=db_now() - 1))


FENCED: list[Callable[[Session, str], object]] = [
    lambda session, job: job_runs.fence(session, job, 1, step=99),
    lambda session, job: job_runs.heartbeat(session, job, 1, 30),
    lambda session, job: job_runs.release(session, job, 1, "x"),
    lambda session, job: job_runs.succeed(session, job, 1, fine_tuned_model="ft:x"),
    lambda session, job: job_runs.fail(session, job, 1, "code", "message"),
    lambda session, job: job_runs.finish_cancel(session, job, 1),
    lambda session, job: job_runs.requeue(session, job, 1, LOST, 3),
]


@pytest.mark.parametrize("write", FENCED)
def test_a_write_of_an_older_attempt_changes_nothing(
    database: Database, write: Callable[[Session, str], object]
) -> None:
    job_id = queued(database)
    claim(database)
    expire(database, job_id)
    with database.write() as session:
        assert job_runs.requeue_expired(session, 3) == [job_id]
    assert claim(database) is not None
    before = state(database, job_id)
    with pytest.raises(LeaseLostError), database.write() as session:
        write(session, job_id)
    after = state(database, job_id)
    assert (after.status, after.attempt, after.step) == ("running", 2, before.step)
    assert after.lease_until == before.lease_until


def pause(database: Database, job_id: str) -> str:
    with database.write() as session:
        return jobs.pause(session, tenancy.default_project(session).id, job_id).status


def resume(database: Database, job_id: str) -> str:
    with database.write() as session:
        return jobs.resume(session, tenancy.default_project(session).id, job_id).status


def test_a_queued_job_is_paused_at_once_and_not_claimed_until_resumed(database: Database) -> None:
    job_id = queued(database)
    assert pause(database, job_id) == "paused"
    assert claim(database) is None
    with pytest.raises(InvalidRequestError, match="has status 'paused'"):
        pause(database, job_id)
    assert resume(database, job_id) == "queued"
    assert claim(database) is not None


def test_a_running_job_pauses_when_its_worker_lets_it_go(database: Database) -> None:
    job_id = queued(database)
    claim(database)
    assert pause(database, job_id) == "running"
    with database.write() as session:
        assert job_runs.heartbeat(session, job_id, 1, 30) == job_runs.Wishes(False, True)
        assert job_runs.wishes(session, job_id) == job_runs.Wishes(False, True)
        assert job_runs.release(session, job_id, 1, "x") == JobStatus.PAUSED
    assert not state(database, job_id).pause_requested
    assert resume(database, job_id) == "queued"


def test_a_pause_outlives_the_worker_that_was_to_obey_it(database: Database) -> None:
    job_id = queued(database)
    claim(database)
    pause(database, job_id)
    expire(database, job_id)
    with database.write() as session:
        job_runs.requeue_expired(session, 3)
    assert state(database, job_id).status == "paused"


def test_a_pause_that_was_withdrawn_does_not_happen(database: Database) -> None:
    job_id = queued(database)
    claim(database)
    pause(database, job_id)
    assert resume(database, job_id) == "running"
    with database.write() as session:
        assert job_runs.release(session, job_id, 1, "x") == JobStatus.QUEUED
    with pytest.raises(InvalidRequestError, match="only a paused job"):
        resume(database, job_id)


def test_a_live_lease_is_left_alone(database: Database) -> None:
    queued(database)
    claim(database)
    with database.write() as session:
        assert job_runs.requeue_expired(session, 3) == []


def test_attempts_without_a_checkpoint_end_in_failure(database: Database) -> None:
    job_id = queued(database)
    for attempt in (1, 2, 3):
        claim(database)
        with database.write() as session:
            status = job_runs.requeue(session, job_id, attempt, LOST, 3)
        assert status == (JobStatus.FAILED if attempt == 3 else JobStatus.QUEUED)
    ended = state(database, job_id)
    assert (ended.error_code, ended.finished_at is not None) == ("trainer_crashed", True)


@pytest.mark.parametrize("end", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED])
def test_a_terminal_state_never_changes(database: Database, end: JobStatus) -> None:
    job_id = queued(database)
    claim(database)
    with database.write() as session:
        assert jobs.move(session, job_id, end)
        assert not any(jobs.move(session, job_id, other) for other in JobStatus)
    assert state(database, job_id).status == end


def test_events_have_no_gap_under_concurrent_writers(database: Database) -> None:
    job_id = queued(database)

    def append(index: int) -> None:
        with database.write() as session:
            events.append(session, job_id, str(index))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(24)))
    with database.read() as session:
        numbers = session.scalars(select(Event.sequence).where(Event.job_id == job_id)).all()
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 24


@pytest.mark.parametrize(
    ("file_status", "n_valid", "on_error", "form", "expected"),
    [
        ("uploaded", 0, "fail", "", JobStatus.VALIDATING_FILES),
        ("processed", 2, "fail", "chat", JobStatus.QUEUED),
        ("error", 2, "fail", "chat", JobStatus.FAILED),
        ("error", 2, "skip", "chat", JobStatus.QUEUED),
        ("error", 0, "skip", "chat", JobStatus.FAILED),
        ("processed", 2, "fail", "preference", JobStatus.FAILED),
    ],
)
def test_a_job_waits_for_its_file_and_obeys_the_policy(
    database: Database,
    file_status: str,
    n_valid: int,
    on_error: str,
    form: str,
    expected: JobStatus,
) -> None:
    with database.write() as session:
        project = tenancy.default_project(session)
        report = {"n_rows": 3, "n_valid_rows": n_valid, "form": form}
        session.add(
            File(
                id="file-x",
                project_id=project.id,
                purpose="fine-tune",
                filename="x",
                bytes=1,
                sha256="",
                object_key="files/file-x",
                status=file_status,
                report=report,
            )
        )
        spec = TrainingSpec.model_validate(
            {
                "model": "base",
                "training_file": "file-x",
                "seed": 1,
                "objective": {"type": "sft"},
                "peft": {"type": "lora"},
                "on_error": on_error,
            }
        )
        job_id = jobs.create(session, project.id, spec, None).id
    with database.write() as session:
        jobs.advance_validated(session, lambda spec: DataDemand(frozenset({"chat"})))
    assert state(database, job_id).status == expected


def test_an_unknown_name_is_not_found_and_never_the_base(database: Database) -> None:
    with database.read() as session:
        assert adapters.resolve(session, "p", "base").adapter is None
        with pytest.raises(NotFoundError):
            adapters.resolve(session, "p", "ft:base:local::nothing1")


def test_identifiers_are_never_given_twice_by_parent_and_child() -> None:
    made = [new_id("x-") for _ in range(500)]
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os\nfrom models.tables import new_id\nnew_id('')\n"
            "os.fork()\nos.write(1, (new_id('') + ' ').encode())",
        ],
        capture_output=True,
        check=True,
        text=True,
    )
    assert len(set(made)) == 500
    assert len(set(child.stdout.split())) == 2


def test_ordered_identifiers_sort_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for milliseconds in (1, 31, 32, 1_800_000_000_000, 1_800_000_000_001, 2**45 - 1):
        monkeypatch.setattr("time.time_ns", lambda now=milliseconds: now * 1_000_000)
        made += sorted([ordered_id("x-"), ordered_id("x-")])
    assert made == sorted(set(made))
    assert {len(each) for each in made} == {len(new_id("x-"))}
