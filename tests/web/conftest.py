"""A browser, and the API with its page; what a worker does is done through its registry."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Page

from api.app import create_app
from api.cli.migrate import upgrade
from models.db import Database
from models.domain.machine import Device, Machine
from models.domain.reports import StepMetrics
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import adapters, checkpoints, events, job_runs, jobs, metrics, tenancy, workers
from models.settings import Settings, WorkerSettings
from models.storage import open_store
from models.tables import Adapter, Checkpoint, Job, new_id
from tests.api.fake_inference import serving
from worker.lint_files import FileLinter
from worker.training import methods, objectives

AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
TOTAL_STEPS = 120
ADAPTER = "ft:base:local:desk:abcdefgh"


@dataclass
class Site:
    """The service, and what tests arrange in it."""

    url: str
    key: str
    database: Database
    settings: Settings
    scratch: Path
    faults: list[str] = field(default_factory=list)
    app: FastAPI | None = None

    def job(self, suffix: str = "desk", **changes: Any) -> str:
        """Add a queued job."""
        fields = {
            "model": "base",
            "training_file": "file-none",
            "suffix": suffix,
            "seed": 7,
            "objective": objectives.parse_params({"type": "sft"}).model_dump(),
            "peft": methods.parse_params({"type": "lora"}).model_dump(),
        }
        with self.database.write() as session:
            project = tenancy.default_project(session)
            spec = TrainingSpec.model_validate(fields | changes).resolved(320, 135_000_000)
            job = jobs.create(session, project.id, spec, None)
            jobs.move(session, job.id, JobStatus.QUEUED)
            return job.id

    def start(self, job_id: str) -> None:
        with self.database.write() as session:
            claimed = job_runs.claim(session, "worker", 600)
            assert claimed is not None
            assert claimed.id == job_id

    def steps(self, job_id: str, first: int, last: int) -> None:
        """Do what a trainer's reporter does for some steps."""
        draw = random.Random(first)
        points = []
        for step in range(first, last + 1):
            loss = 0.3 + 4 / (1 + step / 8) + draw.uniform(-0.1, 0.1)
            judged = {"full_valid_loss": loss + 0.15} if step % 20 == 0 else {}
            points.append(
                StepMetrics(
                    step=step,
                    epoch=step / 40,
                    train_loss=loss,
                    train_mean_token_accuracy=0.5,
                    learning_rate=2e-4 * (1 - step / TOTAL_STEPS),
                    grad_norm=1.0 + draw.random(),
                    tokens=900,
                    trained_tokens=500,
                    tokens_per_second=850 + draw.uniform(-40, 40),
                    **judged,
                )
            )
        with self.database.write() as session:
            job_runs.fence(session, job_id, 1, step=last, total_steps=TOTAL_STEPS)
            metrics.record(session, job_id, 1, points, TOTAL_STEPS)

    def checkpoint(self, job_id: str, step: int) -> None:
        with self.database.write() as session:
            checkpoints.record(
                session,
                Checkpoint(
                    id=new_id("ftckpt_"),
                    job_id=job_id,
                    attempt=1,
                    step=step,
                    name=f"ft:base:local:desk:{job_id[-8:]}:ckpt-step-{step}",
                    object_prefix="x",
                    adapter_digest="d" * 40,
                    base_fingerprint="f" * 32,
                    metrics={"step": step, "train_loss": 0.9, "full_valid_loss": 1.1},
                ),
            )

    def fail(self, job_id: str, message: str) -> None:
        with self.database.write() as session:
            job_runs.fail(session, job_id, 1, "out_of_memory", message)

    def finish(self, job_id: str) -> None:
        with self.database.write() as session:
            job_runs.succeed(session, job_id, 1, fine_tuned_model=ADAPTER)

    def publish(self, job_id: str, name: str) -> None:
        """Publish the adapter of a job that `finish` has ended, as its trainer does."""
        with self.database.write() as session:
            job = session.get_one(Job, job_id)
            adapters.publish(
                session,
                Adapter(
                    name=name,
                    project_id=job.project_id,
                    job_id=job_id,
                    base_model="base",
                    digest="d" * 64,
                    bytes=19_600_000,
                    manifest={
                        "base_fingerprint": "f" * 64,
                        "method": "lora",
                        "objective": "sft",
                        "precision": {"type": "nf4"},
                        "step": TOTAL_STEPS,
                        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
                    },
                ),
            )

    def status(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def announce_worker(self, memory: int) -> None:
        """Have a worker on a machine with so many bytes of memory, a quarter of it in use."""
        used = memory // 4
        device = Device(type="cpu", index=0, name="2 x CPU", memory_total=memory, memory_used=used)
        machine = Machine(
            devices=(device,),
            memory_total=memory,
            memory_available=memory - used,
            memory_used=used,
        )
        about = workers.Announcement("worker", "desk-1", 7, "0.1.0", 1, machine)
        with self.database.write() as session:
            workers.announce(session, about, 600)

    def say(self, job_id: str, message: str) -> None:
        with self.database.write() as session:
            events.append(session, job_id, message)

    def lint(self) -> None:
        worker = WorkerSettings(scratch_dir=self.scratch)
        linter = FileLinter(self.database, open_store(self.settings.storage), worker)
        while linter.lint_next():
            pass


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with the schema; each site copies it, which is much faster."""
    path = tmp_path_factory.mktemp("migrated") / "tunery.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def site(tmp_path: Path, migrated_database: Path) -> Iterator[Site]:
    shutil.copy(migrated_database, tmp_path / "tunery.db")
    with running_site(tmp_path) as made:
        yield made


def settings_in(folder: Path) -> Settings:
    return Settings.model_validate(
        {
            "database": {"url": f"sqlite:///{folder / 'tunery.db'}"},
            "broker": {"url": f"redis+socket://{folder / 'nobody.sock'}"},
            "storage": {"url": f"file:{folder / 'objects'}"},
            "models": {"catalog": {"base": "path:/nowhere"}},
            "inference": {"token": "secret-between-servers"},
        }
    )


def new_key(database: Database) -> str:
    with database.write() as session:
        return tenancy.create_key(session, tenancy.default_project(session).id, "tester")[1]


@contextmanager
def running_site(tmp_path: Path) -> Iterator[Site]:
    """Run the API with its page until the block ends; the folder holds a migrated database."""
    settings = settings_in(tmp_path)
    database = Database(settings.database)
    app = create_app(settings)
    with serving(app, lifespan="on") as address:
        key = new_key(database)
        yield Site(address, key, database, settings, tmp_path / "scratch", app=app)
    database.close()


def open_context(browser: Browser, site: Site, **options: Any) -> BrowserContext:
    """Return a logged-in browser window whose faults end in `site.faults`."""
    context = browser.new_context(base_url=site.url, **options)
    context.set_default_timeout(10_000)
    context.on("weberror", lambda error: site.faults.append(str(error.error)))
    context.on(
        "console",
        lambda said: site.faults.append(said.text) if said.type == "error" else None,
    )
    context.on(
        "request",
        lambda asked: (
            None
            if asked.url.startswith((site.url, "data:", "blob:"))
            else site.faults.append(asked.url)
        ),
    )
    page = context.new_page()
    page.goto(f"{site.url}/ui/login")
    page.get_by_label("API key").fill(site.key)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/ui/jobs")
    page.close()
    return context


@pytest.fixture
def context(browser: Browser, site: Site) -> Iterator[BrowserContext]:
    made = open_context(browser, site)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def rows(n_rows: int) -> bytes:
    made = [
        {
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": f"Answer {number}."},
            ]
        }
        for number in range(n_rows)
    ]
    return "\n".join(json.dumps(row) for row in made).encode()
