"""What the feed asks of jobs, on SQLite and PostgreSQL."""

from models.db import Database
from models.domain.training import TrainingSpec
from models.registry import checkpoints, events, jobs, metrics, tenancy

SPEC = TrainingSpec(
    model="base", training_file="file-x", seed=1, objective={"type": "sft"}, peft={"type": "lora"}
)


def test_marks_of_more_jobs_than_a_statement_asks_for(database: Database) -> None:
    assert events.MARKED < 60
    with database.write() as session:
        project = tenancy.create_project(session, "one").id
        ids = [jobs.create(session, project, SPEC, None).id for _ in range(60)]
        first = events.last_sequence(session, ids[0])
        events.append(session, ids[55], "more")
    with database.read() as session:
        found = events.marks(session, ids)
        assert events.marks(session, []) == {}
    assert set(found) == set(ids)
    assert [found[ids[at]][1] for at in (0, 54, 55, 59)] == [first, first, first + 1, first]
    assert found[ids[0]][0] == "validating_files"


def test_what_comes_after_a_place_is_read_in_order(database: Database) -> None:
    with database.write() as session:
        project = tenancy.create_project(session, "one").id
        job = jobs.create(session, project, SPEC, None)
        start = events.last_sequence(session, job.id)
        events.append(session, job.id, "told")
        events.append(session, job.id, "step", data={"loss": 1.5})
        events.append(session, job.id, "last")
    with database.read() as session:
        found = events.after(session, job.id, start, 2)
        assert [each.message for each in found] == ["told", "step"]
        assert found[1].data == {"loss": 1.5}
        assert metrics.after(session, job.id, 0, 5) == []
        assert list(checkpoints.after(session, job.id, 0)) == []
