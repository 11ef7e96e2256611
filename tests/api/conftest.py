"""The API on SQLite and a directory, with a broker that nobody runs: it must not matter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.domain.status import JobStatus
from models.logs import configure_logging
from models.registry import inference_servers, job_runs, jobs, tenancy
from models.registry.inference_servers import Announcement
from models.settings import Settings, WorkerSettings
from models.storage import open_store
from tests.api.calls import new_job
from tests.api.fake_inference import FakeInference, running_fake
from tests.apps import app_for
from tests.services import MigratedUrl
from worker.lint_files import FileLinter

LIMIT = 2000
TOKEN = "secret-between-servers"


@pytest.fixture(scope="session", autouse=True)
def _logging() -> None:
    """Log as a process does: structlog's default, for terminals, takes seconds for a traceback."""
    configure_logging("WARNING", "test")


@pytest.fixture
def settings(tmp_path: Path, migrated_url: MigratedUrl) -> Settings:
    return Settings.model_validate(
        {
            "database": {"url": migrated_url("sqlite")},
            "broker": {"url": f"redis+socket://{tmp_path / 'nobody.sock'}"},
            "storage": {"url": f"file:{tmp_path / 'objects'}"},
            "api": {"max_upload_bytes": LIMIT},
            "inference": {"token": TOKEN},
            "models": {"catalog": {"base": "path:/nowhere"}},
        }
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    made = Database(settings.database)
    yield made
    made.close()


@pytest.fixture
def client(settings: Settings, database: Database) -> Iterator[TestClient]:
    """A client with a valid key of the default project."""
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "test")
    with TestClient(app_for(settings), raise_server_exceptions=False) as made:
        made.headers["authorization"] = f"Bearer {secret}"
        yield made


@pytest.fixture
def job_id(client: TestClient, database: Database) -> str:
    """A job that a worker has claimed."""
    made = str(new_job(client).json()["id"])
    with database.write() as session:
        jobs.move(session, made, JobStatus.QUEUED)
        assert job_runs.claim(session, "worker", 600) is not None
    return made


@pytest.fixture
def lint(database: Database, settings: Settings, tmp_path: Path) -> Any:
    """Lint all uploads, as a worker does."""

    def run() -> None:
        worker = WorkerSettings(scratch_dir=tmp_path / "scratch")
        linter = FileLinter(database, open_store(settings.storage), worker)
        while linter.lint_next():
            pass

    return run


@pytest.fixture
def inference(client: TestClient, database: Database) -> Iterator[FakeInference]:
    """The server that `client` is served by; `client` is asked for so that "base" exists."""
    with running_fake() as fake:
        with database.write() as session:
            announcement = Announcement("fake-1", "base", "f" * 64, "nf4", fake.url)
            inference_servers.announce(session, announcement, 60)
        yield fake
