"""The service as a browser meets it, and what tests arrange in it without a worker."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext
from sqlalchemy import delete, update

from api import page_session
from api.app import create_app
from models.db import Database
from models.domain.machine import Device, Machine
from models.domain.reports import StepMetrics
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import adapters, checkpoints, events, job_runs, jobs, metrics, tenancy, workers
from models.settings import Settings, WorkerSettings
from models.storage import open_store
from models.tables import Adapter, ApiKey, Base, BaseModel, Checkpoint, Job, new_id
from tests.api.fake_inference import serving
from worker.lint_files import FileLinter
from worker.training import methods, objectives

AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
TOTAL_STEPS = 120
ADAPTER = "ft:base:local:desk:abcdefgh"
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>'
KEY_NAME = "tester"
VIOLATION = "The policy of the page was violated"


@dataclass
class Site:
    """The service, and what tests arrange in it."""

    url: str
    key: str
    cookie: str
    database: Database
    settings: Settings
    scratch: Path
    faults: list[str] = field(default_factory=list)
    app: FastAPI | None = None

    def clear(self) -> None:
        """Make it a new service again, with its first key and base model."""
        kept = {"alembic_version", "projects", "api_keys", "base_models"}
        with self.database.write() as session:
            for table in reversed(Base.metadata.sorted_tables):
                if table.name not in kept:
                    session.execute(delete(table))
            session.execute(delete(ApiKey).where(ApiKey.name != KEY_NAME))
            session.execute(update(BaseModel).values(shape=None))
        self.faults.clear()

    def upload(self, data: bytes, name: str = "rows.jsonl") -> str:
        """Upload a data set and have it linted; return the path of its page."""
        answer = httpx.post(
            f"{self.url}/v1/files",
            headers={"authorization": f"Bearer {self.key}"},
            data={"purpose": "fine-tune"},
            files={"file": (name, data)},
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        self.lint()
        return f"/ui/datasets/{answer.json()['id']}"

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

    def steps(self, job_id: str, first: int, last: int, attempt: int = 1) -> None:
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
                    recorded_at=1.8e9 + 2 * step,
                    **judged,
                )
            )
        with self.database.write() as session:
            job_runs.fence(session, job_id, attempt, step=last, total_steps=TOTAL_STEPS)
            metrics.record(session, job_id, attempt, points, TOTAL_STEPS)

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

    def release(self, job_id: str) -> None:
        """Give a running job back, as a worker does that was asked to pause it."""
        with self.database.write() as session:
            job_runs.release(session, job_id, 1, "Paused")

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

    def announce_worker(self, memory: int, seconds: float = 600) -> None:
        """Have a worker with so many bytes of memory, a quarter in use, alive for `seconds`."""
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
            workers.announce(session, about, seconds)

    def say(self, job_id: str, message: str) -> None:
        with self.database.write() as session:
            events.append(session, job_id, message)

    def lint(self) -> None:
        worker = WorkerSettings(scratch_dir=self.scratch)
        linter = FileLinter(self.database, open_store(self.settings.storage), worker)
        while linter.lint_next():
            pass


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


def make_key(database: Database) -> tuple[str, str]:
    """Make a key; return it, and the cookie of a page that is logged in with it."""
    with database.write() as session:
        project = tenancy.default_project(session)
        key, secret = tenancy.create_key(session, project.id, KEY_NAME)
        return secret, page_session.make_cookie(key)


@contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """Run the API with its page until the block ends; the folder holds a migrated database."""
    settings = settings_in(folder)
    database = Database(settings.database)
    app = create_app(settings)
    with serving(app, lifespan="on") as address:
        keys = make_key(database)
        yield Site(address, *keys, database, settings, folder / "scratch", app=app)
    database.close()


def open_context(browser: Browser, site: Site, **options: Any) -> BrowserContext:
    """Return a logged-in browser window whose faults end in `site.faults`."""
    context = browser.new_context(base_url=site.url, **options)
    context.set_default_timeout(30_000)
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
    context.add_init_script(
        "document.addEventListener('securitypolicyviolation', (event) => "
        f"console.error('{VIOLATION}: ' + event.violatedDirective + ' ' + event.blockedURI))"
    )
    context.add_cookies([{"name": page_session.COOKIE, "value": site.cookie, "url": site.url}])
    return context


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


def everything(site: Site) -> list[str]:
    """Fill the service, and return the path of every page."""
    planted = rows(24).split(b"\n")
    planted[2] = b'{"messages": [{"role": "user"}]}'
    data = site.upload(b"\n".join(planted))
    done = site.job("harbour-desk")
    site.start(done)
    site.steps(done, 1, TOTAL_STEPS)
    site.checkpoint(done, 40)
    site.checkpoint(done, TOTAL_STEPS)
    site.finish(done)
    site.publish(done, ADAPTER)
    failed = site.job("too-large")
    site.start(failed)
    site.fail(failed, "The worker ran out of memory. Lower max_seq_length.")
    running = site.job("night-watch")
    site.start(running)
    site.steps(running, 1, 48)
    site.job("waiting")
    site.announce_worker(8 * 10**9)
    return [
        "/ui/jobs",
        "/ui/jobs?status=failed",
        "/ui/jobs/new",
        *(f"/ui/jobs/{each}" for each in (done, failed, running)),
        "/ui/datasets",
        data,
        "/ui/models",
        f"/ui/models/{ADAPTER}",
        "/ui/playground",
        "/ui/keys",
        "/ui/workers",
        "/ui/usage",
        "/ui/settings",
        "/ui/compare?ids=" + ",".join((done, running)),
    ]
