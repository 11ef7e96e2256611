"""What a process writes to standard error reaches the log of its job, and never holds it up."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.db import Database
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import base_models, job_logs, job_runs, jobs, tenancy
from models.settings import DatabaseSettings
from tests.services import MigratedUrl
from worker import job_log
from worker.job_log import LogKeeper, LogPipe

JOB = "ftjob-1"


@contextmanager
def writing(code: str) -> Iterator[tuple[LogPipe, "subprocess.Popen[bytes]"]]:
    """Run Python that writes by ``say`` to standard error."""
    prepared = f"import os\nsay = lambda text: os.write(2, text)\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", prepared],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        yield LogPipe(process.stderr), process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def let_go(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def test_lines_since_the_job_began_are_taken_whole_and_at_the_end_all(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "say(b'early\\n')\ninput()\nsay(b'one\\ntw')\ninput()\nsay(b'o\\n\\xff')\nos.abort()"
    with writing(code) as (pipe, process):
        said = ""
        while "early" not in said:
            said += capfd.readouterr().err
            time.sleep(0.01)
        pipe.begin(JOB)
        let_go(process)
        taken = ""
        while not taken:
            taken = pipe.take(JOB)
        assert taken == "one\n"
        let_go(process)
        process.wait(30)
        assert pipe.take(JOB, at_end=True) == "two\n\ufffd"
    assert capfd.readouterr().err.startswith("one\n")  # passed on as it came


def test_a_flood_that_nobody_takes_holds_nobody_up_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_log, "MAX_HELD_BYTES", 1000)
    with writing("input()\nfor _ in range(3000): say(b'x' * 99 + b'\\n')") as (pipe, process):
        pipe.begin(JOB)
        let_go(process)
        process.wait(30)
        text = pipe.take(JOB, at_end=True)
    first, *lines = text.splitlines()
    assert first == "[299,000 bytes were not kept]"
    assert lines == ["x" * 99] * 10
    capfd.readouterr()


def test_a_line_that_names_another_job_is_not_among_a_jobs(
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines = b'{"job_id": "ftjob-1", "n": 1}\n{"job_id": "ftjob-2"}\nfor all\n'
    with writing(f"input()\nsay({lines!r})") as (pipe, process):
        for job_id in (JOB, "ftjob-2"):
            pipe.begin(job_id)
        let_go(process)
        process.wait(30)
        assert pipe.take(JOB, at_end=True) == '{"job_id": "ftjob-1", "n": 1}\nfor all\n'
        assert pipe.take("ftjob-2") == '{"job_id": "ftjob-2"}\nfor all\n'
        assert pipe.take("ftjob-3") == ""
    capfd.readouterr()


def test_what_the_database_does_not_take_is_written_the_next_time(
    migrated_url: MigratedUrl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    database = Database(DatabaseSettings(url=migrated_url("sqlite")))
    nowhere = Database(DatabaseSettings(url=f"sqlite:///{tmp_path / 'empty.db'}"))
    monkeypatch.setattr(job_log, "KEEP_SECONDS", 0.0)
    with database.write() as session:
        base_models.sync_catalog(session, {"base": "path:/nowhere"})
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
    with writing("input()\nsay(b'boom\\n')") as (pipe, process):
        pipe.begin(job.id)
        keeper = LogKeeper(nowhere, job.id, 1, pipe, 10_000)
        let_go(process)
        process.wait(30)
        keeper.keep(at_end=True)
        keeper._database = database
        keeper.keep()
        keeper.keep()
    with database.read() as session:
        assert job_logs.read(session, job.id, 0, 1000).text == "boom\n"
    nowhere.close()
    database.close()
