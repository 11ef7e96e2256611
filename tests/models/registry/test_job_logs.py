"""Logs of jobs: whole lines, bounded, read by an offset that stays, on both databases."""

import pytest

from models.db import Database
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.errors import InvalidRequestError
from models.registry import job_logs, job_runs, jobs, tenancy
from models.registry.job_logs import LogText
from models.tables import Job


@pytest.fixture
def job_id(database: Database) -> str:
    """A job that a worker has claimed once."""
    with database.write() as session:
        spec = TrainingSpec(
            model="base",
            training_file="file-x",
            seed=1,
            objective={"type": "sft"},
            peft={"type": "lora"},
        )
        job = jobs.create(session, tenancy.default_project(session).id, spec, None)
        jobs.move(session, job.id, JobStatus.QUEUED)
        assert job_runs.claim(session, "worker", 30) is not None
        return job.id


def append(database: Database, job_id: str, text: str, attempt: int = 1, keep: int = 2**20) -> bool:
    with database.write() as session:
        return job_logs.append(session, job_id, attempt, text, keep)


def read(database: Database, job_id: str, after: int | None = None, limit: int = 65536) -> LogText:
    with database.read() as session:
        return job_logs.read(session, job_id, after, limit)


def test_a_log_is_read_in_pieces_of_whole_lines_and_from_its_end(
    database: Database, job_id: str
) -> None:
    assert read(database, job_id) == LogText("", 0, 0, 0, 0)
    lines = [f"line {number} säulen\u2028\n" for number in range(60)]
    for at in range(0, 60, 20):
        assert append(database, job_id, "".join(lines[at : at + 20]))
    whole, offset = "", 0
    while (part := read(database, job_id, offset, 300)).text:
        assert part.text.endswith("\n")
        assert len(part.text.encode()) <= 300
        assert part.start == offset
        whole, offset = whole + part.text, part.next
    assert whole == "".join(lines)
    assert offset == part.end == len(whole.encode())
    tail = read(database, job_id, None, 300)
    assert "".join(lines).endswith(tail.text)
    assert tail.text.startswith("line ")
    assert tail.next == tail.end
    with pytest.raises(InvalidRequestError, match="next_offset"):
        read(database, job_id, offset + 1)


def test_the_oldest_lines_go_and_offsets_stay(database: Database, job_id: str) -> None:
    for number in range(30):
        append(database, job_id, f"{number:09d}\n", keep=100)
    part = read(database, job_id, 0)
    assert part.text == "".join(f"{number:09d}\n" for number in range(20, 30))
    assert (part.start, part.first, part.next, part.end) == (200, 200, 300, 300)
    assert read(database, job_id, 290).text == "000000029\n"


def test_a_line_without_an_end_is_cut_between_characters(database: Database, job_id: str) -> None:
    append(database, job_id, "ä" * 50_000)
    part = read(database, job_id, 0, 301)
    assert (part.text, part.next) == ("ä" * 150, 300)


def test_no_control_character_is_kept_and_no_line_of_an_older_attempt(
    database: Database, job_id: str
) -> None:
    append(database, job_id, "a\x00b\x1b[31m\r\n1%\r2%\tx\n")
    assert read(database, job_id, 0).text == "a\ufffdb\ufffd[31m\n1%\n2%\tx\n"
    with database.write() as session:
        job_runs.release(session, job_id, 1, "again")
        assert job_runs.claim(session, "other", 30) is not None
    assert not append(database, job_id, "late\n", attempt=1)
    assert append(database, job_id, "new\n", attempt=2)
    assert read(database, job_id).text.endswith("x\nnew\n")


def test_a_log_is_complete_when_the_job_and_its_last_attempt_have_ended(
    database: Database, job_id: str
) -> None:
    def is_complete() -> bool:
        with database.read() as session:
            return job_logs.is_complete(session, session.get_one(Job, job_id))

    assert not is_complete()
    with database.write() as session:
        job_runs.fail(session, job_id, 1, "x", "It failed.")
    assert not is_complete()
    with database.write() as session:
        job_runs.end_attempt(session, job_id, 1, "failed", 3)
    assert is_complete()
