"""The quick reads of jobs give what the slow ones give."""

import pytest

from models.db import Database
from models.domain.training import TrainingSpec
from models.errors import NotFoundError
from models.registry import job_reads, jobs, tenancy
from models.registry.page import Cursor
from models.tables import Job

SPEC = TrainingSpec(
    model="base", training_file="file-x", seed=1, objective={"type": "sft"}, peft={"type": "lora"}
)


@pytest.fixture
def projects(database: Database) -> tuple[str, str]:
    """A project with three jobs, and another with one."""
    with database.write() as session:
        found = [tenancy.create_project(session, name).id for name in ("one", "other")]
        for project, metadata in ((found[0], {"a": "b"}), (found[0], None), (found[0], None)):
            jobs.create(session, project, SPEC, metadata)
        jobs.create(session, found[1], SPEC, None)
    return found[0], found[1]


def columns(job: Job) -> dict[str, object]:
    return {column.key: getattr(job, column.key) for column in Job.__table__.columns}


@pytest.mark.parametrize("limit", [2, 3])
def test_the_newest_are_the_first_page(
    database: Database, projects: tuple[str, str], limit: int
) -> None:
    page = job_reads.newest(database, projects[0], limit)
    with database.read() as session:
        wanted = jobs.list_page(session, projects[0], Cursor(limit=limit))
        assert [columns(job) for job in page.rows] == [columns(job) for job in wanted.rows]
    assert (len(page.rows), page.has_more) == (limit, limit < 3)


def test_a_job_is_found_by_its_own_project_only(
    database: Database, projects: tuple[str, str]
) -> None:
    (job,) = job_reads.newest(database, projects[1], 5).rows
    assert columns(job_reads.get(database, projects[1], job.id)) == columns(job)
    with pytest.raises(NotFoundError, match="Could not find fine-tuning job"):
        job_reads.get(database, projects[0], job.id)
