"""Where a model comes from and what came of it, on both databases."""

import pytest

from models.db import Database
from models.domain.generation import AdapterRef
from models.domain.training import TrainingSpec
from models.registry import adapters, jobs, lineage, tenancy
from models.tables import Adapter

NAMES = ["ft:base:local::one", "ft:base:local::two", "ft:base:local::three"]


def train(database: Database, name: str, start: AdapterRef | None) -> AdapterRef:
    """Add a job and the adapter that it made."""
    with database.write() as session:
        project = tenancy.default_project(session)
        spec = TrainingSpec(
            model="base",
            init_adapter=start,
            training_file="file-x",
            seed=1,
            objective={"type": "sft"},
            peft={"type": "lora"},
        )
        job = jobs.create(session, project.id, spec, None)
        adapter = Adapter(
            name=name,
            project_id=project.id,
            job_id=job.id,
            base_model="base",
            digest=name.rpartition(":")[2],
            bytes=1,
            manifest={"base_fingerprint": "f"},
        )
        adapters.publish(session, adapter)
        found = adapters.resolve(session, project.id, name).adapter
        assert found is not None
        return found


@pytest.fixture
def chain(database: Database) -> None:
    start = None
    for name in NAMES:
        start = train(database, name, start)


@pytest.mark.usefixtures("chain")
def test_a_model_is_followed_back_to_the_base(database: Database) -> None:
    with database.read() as session:
        project = tenancy.default_project(session).id
        model = adapters.resolve(session, project, NAMES[-1])
        found = lineage.ancestry(session, project, model)
        assert [each.name for each in found] == NAMES[::-1]
        assert [each.digest for each in found] == ["three", "two", "one"]
        assert all(each.is_live and each.job is not None for each in found)
        assert all(each.training_file is None for each in found)


@pytest.mark.usefixtures("chain")
def test_the_successors_of_a_model_are_those_that_started_from_it(database: Database) -> None:
    with database.read() as session:
        project = tenancy.default_project(session).id
        found = [
            [
                job.spec["init_adapter"]["name"]
                for job in lineage.successors(
                    session, project, adapters.resolve(session, project, name)
                )
            ]
            for name in NAMES
        ]
    assert found == [[NAMES[0]], [NAMES[1]], []]


def test_a_base_model_has_no_ancestors(database: Database) -> None:
    with database.read() as session:
        project = tenancy.default_project(session).id
        base = adapters.resolve(session, project, "base")
        assert lineage.ancestry(session, project, base) == []
        assert lineage.successors(session, project, base) == []


@pytest.mark.usefixtures("chain")
def test_who_calls_a_model_learns_that_it_is_wanted_merged_and_a_job_does_not(
    database: Database,
) -> None:
    for merged in (True, False):
        with database.write() as session:
            adapters.set_merged(session, NAMES[0], merged=merged)
        with database.read() as session:
            project = tenancy.default_project(session).id
            called = adapters.resolve(session, project, NAMES[0]).adapter
            kept = adapters.resolve_own(session, project, NAMES[0]).adapter
        assert called is not None
        assert kept is not None
        assert (called.merged, kept.merged) == (merged, False)
