"""Projects that compete for workers alternate by their shares; priorities hold within a project."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update

from models.db import Database, db_now
from models.domain.limits import ProjectLimits
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import job_runs, jobs, tenancy, turns
from models.tables import Job, JobAttempt


def project(database: Database, name: str, **limits: float) -> str:
    with database.write() as session:
        made = tenancy.create_project(session, name)
        tenancy.set_limits(session, made, ProjectLimits.model_validate(limits))
        return made.id


def queue(database: Database, owner: str, priority: int = 0, devices: int = 1) -> str:
    with database.write() as session:
        spec = TrainingSpec(
            model="base",
            training_file="file-x",
            seed=1,
            objective={"type": "sft"},
            peft={"type": "lora"},
            priority=priority,
            num_devices=devices,
        )
        job = jobs.create(session, owner, spec, None)
        jobs.move(session, job.id, JobStatus.QUEUED)
        return job.id


def claim(database: Database) -> Job | None:
    with database.write() as session:
        return job_runs.claim(session, "worker", 30)


def run(database: Database, seconds: float) -> str:
    """Let the next job run for so long; return its project."""
    return run_job(database, seconds).project_id


def run_job(database: Database, seconds: float) -> Job:
    """Let the next job run for so long; return it."""
    with database.write() as session:
        job = job_runs.claim(session, "worker", 30)
        assert job is not None
        session.execute(
            update(JobAttempt)
            .where(JobAttempt.job_id == job.id)
            .values(started_at=db_now() - seconds)
        )
        job_runs.succeed(session, job.id, 1, fine_tuned_model="ft:x")
        job_runs.end_attempt(session, job.id, 1, "succeeded", 0)
        return job


def test_many_jobs_of_one_project_do_not_hold_up_the_few_of_another(database: Database) -> None:
    many, few = project(database, "many"), project(database, "few")
    for _ in range(6):
        queue(database, many, priority=50)
    for _ in range(2):
        queue(database, few)
    owners = [run(database, 60) for _ in range(8)]
    assert owners[0] == many
    assert owners[:4].count(few) == 2
    assert owners[4:] == [many] * 4


def test_a_project_with_a_larger_share_has_more_turns(database: Database) -> None:
    large, small = project(database, "large", share=3), project(database, "small")
    for owner in (large, small):
        for _ in range(8):
            queue(database, owner)
    owners = [run(database, 60) for _ in range(8)]
    assert owners.count(large) == 6


def test_running_jobs_count_with_all_their_devices_and_old_ones_do_not(database: Database) -> None:
    first, second = project(database, "first"), project(database, "second")
    queue(database, first, devices=2)
    queue(database, second)
    assert claim(database) is not None
    assert claim(database) is not None
    with database.write() as session:
        session.execute(update(JobAttempt).values(started_at=db_now() - 2 * turns.WINDOW_SECONDS))
        had = turns.device_seconds(session)
    assert had[first] == pytest.approx(2 * turns.WINDOW_SECONDS)
    assert had[second] == pytest.approx(turns.WINDOW_SECONDS)
    with database.write() as session:
        session.execute(update(JobAttempt).values(ended_at=db_now() - turns.WINDOW_SECONDS - 1))
        assert turns.device_seconds(session) == {}


def test_no_more_jobs_run_than_a_project_may_have(database: Database) -> None:
    limited, free = project(database, "limited", max_running_jobs=2), project(database, "free")
    for _ in range(6):
        queue(database, limited)
    queue(database, free)
    with ThreadPoolExecutor(6) as pool:
        claimed = [job for job in pool.map(lambda _: claim(database), range(6)) if job]
    while (job := claim(database)) is not None:  # what a concurrent claim had locked
        claimed.append(job)
    owners = [job.project_id for job in claimed]
    assert (owners.count(limited), owners.count(free)) == (2, 1)


def test_places_in_the_queue_are_told_in_the_order_of_the_claims(database: Database) -> None:
    large, small = project(database, "large", share=2.3), project(database, "small")
    late = project(database, "late", share=0.71)
    for owner, number in ((large, 7), (small, 5), (late, 3)):
        for at in range(number):
            queue(database, owner, priority=at % 2)
    run(database, 60)
    run(database, 60)
    with database.read() as session:
        queued = session.scalars(select(Job).where(Job.status == JobStatus.QUEUED)).all()
        told = turns.places(session, queued)
    assert sorted(place.position for place in told.values()) == list(range(1, 14))
    assert {place.length for place in told.values()} == {13}
    taken = [run_job(database, 60).id for _ in range(13)]
    assert sorted(told, key=lambda job_id: told[job_id].position) == taken
    with database.read() as session:
        assert turns.places(session, session.scalars(select(Job))) == {}


def test_no_more_jobs_are_placed_than_are_worth_counting(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "MAX_PLACED", 2)
    owner = project(database, "one")
    # Those of one millisecond are in the order of their random identifiers.
    made = sorted(queue(database, owner) for _ in range(3))
    with database.read() as session:
        told = turns.places(session, [session.get_one(Job, job_id) for job_id in made])
    assert {job_id: place.position for job_id, place in told.items()} == {made[0]: 1, made[1]: 2}
