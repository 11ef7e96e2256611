"""A worker without a job compiles the loops that nobody has compiled; a job goes first."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from models.db import Database
from models.domain.status import JobStatus
from models.registry import jobs
from tests.worker.training.service import Service, chat_rows
from worker import loops
from worker.kernels import cache
from worker.loops import compile_all

REAL_FOLDER = cache.folder


@pytest.fixture
def service(tmp_path: Path, tiny_model: Path) -> Iterator[Service]:
    made = Service.create(tmp_path, tiny_model)
    yield made
    made.database.close()


@pytest.fixture
def database(service: Service) -> Database:
    return service.database


@pytest.fixture(autouse=True)
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "loops"
    folder.mkdir()
    monkeypatch.setattr(cache, "folder", lambda: folder)
    return folder


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(loops, "COMMAND", [sys.executable, "-c", code])
    monkeypatch.setattr(loops, "POLL_SECONDS", 0.01)


def never() -> bool:
    return False


def test_what_is_there_is_not_compiled_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, "raise SystemExit(3)")
    cache.mark_complete()
    with capture_logs() as logs:
        assert compile_all(database, never)
    assert logs == []


def test_a_child_compiles(
    database: Database, nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = nothing_compiled / "done"
    child(monkeypatch, f"open({str(done)!r}, 'w')")
    with capture_logs() as logs:
        assert compile_all(database, never)
    assert done.exists()
    assert [each["event"] for each in logs] == ["loops_compiled"]


def test_a_child_that_fails_is_not_tried_again_and_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, "raise SystemExit(3)")
    with capture_logs() as logs:
        assert compile_all(database, never)
    assert [(each["event"], each["exit_status"]) for each in logs] == [("loops_not_compiled", 3)]


def test_a_job_that_waits_goes_first(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.upload("file-train", chat_rows(4))
    job = service.submit()
    with service.database.write() as session:
        jobs.move(session, job.id, JobStatus.QUEUED)
    child(monkeypatch, "import time; time.sleep(600)")
    assert not compile_all(service.database, never)


def test_a_worker_that_stops_does_not_wait_for_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, "import time; time.sleep(600)")
    asked = iter([False, False, True])
    assert not compile_all(database, lambda: next(asked))


def test_the_command_compiles_all_and_says_so(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = REAL_FOLDER()
    assert folder is not None
    (folder / "complete").unlink(missing_ok=True)
    monkeypatch.setattr(cache, "folder", REAL_FOLDER)
    assert not cache.is_complete()
    assert compile_all(database, never)
    assert cache.is_complete()
