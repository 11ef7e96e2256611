"""Server time and bytes of every page of a large service: 10,000 jobs, 100,000 metric points.

The service is the real application in this process, on SQLite in a temporary folder; its tables
are filled directly. ``python -m bench.page [--quick] [--json]``
"""

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert

from api import page_session
from api.app import create_app
from api.cli.migrate import upgrade
from bench._report import describe_machine, parse_options, print_figures
from models.db import Database
from models.domain.status import FileStatus, JobStatus
from models.domain.training import TrainingSpec
from models.logs import configure_logging
from models.registry import base_models, tenancy
from models.settings import Settings
from models.tables import Adapter, ApiKey, Base, Event, File, Job, Metric
from worker.training import methods, objectives

N_JOBS, N_POINTS, N_FILES = 10_000, 100_000, 1_000
DATA_BYTES = 10**9
BASE = "base"
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Large:
    """What `fill` has made: the key to log in with, the longest job, its model, its data set."""

    key: ApiKey
    job_id: str
    model: str
    file_id: str

    @property
    def paths(self) -> list[str]:
        return [
            "/ui/jobs",
            "/ui/jobs?q=desk-77&sort=base_model",
            "/ui/jobs/new",
            f"/ui/jobs/{self.job_id}",
            f"/ui/compare?ids={self.job_id},ftjob-{0:024},ftjob-{1:024}",
            "/ui/datasets",
            f"/ui/datasets/{self.file_id}",
            "/ui/models",
            f"/ui/models/{self.model}",
            "/ui/playground",
            "/ui/workers",
            "/ui/usage",
            "/ui/keys",
        ]


def settings_in(folder: Path) -> Settings:
    return Settings.model_validate(
        {
            "database": {"url": f"sqlite:///{folder / 'tunery.db'}"},
            "broker": {"url": f"redis+socket://{folder / 'nobody.sock'}"},
            "storage": {"url": f"file:{folder / 'objects'}"},
            "models": {"catalog": {BASE: "path:/nowhere"}},
        }
    )


def fill(database: Database, n_jobs: int = N_JOBS, n_points: int = N_POINTS) -> Large:
    """Make a service that has been in use for long; its newest job has `n_points` steps."""
    with database.write() as session:
        base_models.sync_catalog(session, {BASE: "path:/nowhere"})
        project = tenancy.default_project(session)
        key, _ = tenancy.create_key(session, project.id, "bench")
        long_id, now = f"ftjob-{n_jobs - 1:024}", time.time()
        name = f"ft:{BASE}:local:desk-{n_jobs - 1}:{n_jobs - 1:08}"

        def add(table: type[Base], rows: list[dict[str, Any]]) -> None:
            session.execute(insert(table), rows)

        add(File, [_file(at, project.id, now) for at in range(N_FILES)])
        add(Job, [_job(at, n_jobs, project.id, now, n_points) for at in range(n_jobs)])
        add(Metric, [_metric(long_id, step) for step in range(1, n_points + 1)])
        add(Event, [_event(long_id, number, now) for number in range(1, n_points + 1)])
        add(Adapter, [_adapter(at, project.id, now) for at in range(n_jobs)])
    return Large(key, long_id, name, f"file-{N_FILES - 1:024}")


def _file(at: int, project_id: str, now: float) -> dict[str, Any]:
    finding = {
        "code": "no_assistant",
        "message": "There is no answer to learn from.",
        "path": "messages",
        "hint": "Add an assistant message.",
    }
    report = {
        "n_rows": 4_000_000,
        "n_valid_rows": 3_900_000,
        "n_findings": 100_000,
        "n_warnings": 50,
        "shape": "openai_chat",
        "form": "chat",
        "findings": [finding | {"line": line, "level": "error"} for line in range(1, 51)],
        "warnings": [finding | {"line": line, "level": "warning"} for line in range(51, 101)],
    }
    return {
        "id": f"file-{at:024}",
        "project_id": project_id,
        "purpose": "fine-tune",
        "filename": f"tickets-{at}.jsonl",
        "bytes": DATA_BYTES,
        "sha256": f"{at:064x}",
        "object_key": f"objects/{at}",
        "status": FileStatus.PROCESSED,
        "report": report,
        "rows_key": f"rows/{at}",
        "created_at": now - N_FILES + at,
    }


def _job(at: int, n_jobs: int, project_id: str, now: float, n_points: int) -> dict[str, Any]:
    spec = TrainingSpec.model_validate(
        {
            "model": BASE,
            "training_file": f"file-{at % N_FILES:024}",
            "suffix": f"desk-{at}",
            "seed": at,
            "objective": objectives.parse_params({"type": "sft"}).model_dump(),
            "peft": methods.parse_params({"type": "lora"}).model_dump(),
        }
    ).resolved(320, 135_000_000)
    is_long = at == n_jobs - 1
    return {
        "id": f"ftjob-{at:024}",
        "project_id": project_id,
        "status": JobStatus.RUNNING if is_long else JobStatus.SUCCEEDED,
        "base_model": BASE,
        "training_file": spec.training_file,
        "spec": spec.model_dump(mode="json"),
        "created_at": now - n_jobs + at,
        "started_at": now - n_jobs + at,
        "step": n_points if is_long else 120,
        "total_steps": 2 * n_points if is_long else 120,
        "attempt": 1,
    }


def _metric(job_id: str, step: int) -> dict[str, Any]:
    values = {
        "step": step,
        "epoch": step / 1000,
        "train_loss": 0.3 + 1 / (1 + step / 800),
        "train_mean_token_accuracy": 0.7312345678,
        "learning_rate": 2e-4 / (1 + step),
        "grad_norm": 1.0123456789,
        "tokens": 900,
        "trained_tokens": 500,
        "tokens_per_second": 851.23456789,
    }
    if step % 1000 == 0:
        values["full_valid_loss"] = 0.4 + 1 / (1 + step / 800)
    judged = "full_valid_loss" in values
    return {"job_id": job_id, "step": step, "attempt": 1, "is_judged": judged, "values": values}


def _event(job_id: str, number: int, now: float) -> dict[str, Any]:
    is_message = number <= 50
    return {
        "id": f"ftevent-{number:024}",
        "job_id": job_id,
        "sequence": number,
        "level": "info",
        "type": "message" if is_message else "metrics",
        "message": f"Step {number}: training loss=0.50",
        "data": None if is_message else {"step": number, "train_loss": 0.5},
        "created_at": now,
    }


def _adapter(at: int, project_id: str, now: float) -> dict[str, Any]:
    return {
        "name": f"ft:{BASE}:local:desk-{at}:{at:08}",
        "project_id": project_id,
        "job_id": f"ftjob-{at:024}",
        "base_model": BASE,
        "digest": f"{at:064x}",
        "bytes": 19_600_000,
        "manifest": {
            "base_fingerprint": "f" * 64,
            "method": "lora",
            "objective": "sft",
            "precision": {"type": "nf4"},
            "step": 120,
            "versions": {"torch": "2"},
        },
        "created_at": now - 10 * N_FILES + at,
    }


def log_in(client: TestClient, key: ApiKey) -> None:
    client.cookies.set(page_session.COOKIE, page_session.make_cookie(key))


def measure(app: FastAPI, large: Large) -> dict[str, dict[str, float]]:
    """Return for each page the median server time in ms, and its bytes as the server writes them.

    The time is what the server itself reports (``openai-processing-ms``), up to the first byte;
    pages are complete by then.
    """
    figures = {}
    with TestClient(app, base_url="http://127.0.0.1") as client:
        log_in(client, large.key)
        for path in large.paths:
            times, answer = [], client.get(path)
            for _ in range(REPEATS):
                answer = client.get(path)
                times.append(float(answer.headers["openai-processing-ms"]))
            if answer.status_code != 200:
                raise SystemExit(f"{path} answered {answer.status_code}")
            n_sent = int(answer.headers["content-length"])
            figures[path] = {"ms": statistics.median(times), "bytes": n_sent}
    return figures


def main() -> None:
    options = parse_options(__doc__)
    configure_logging("WARNING", "bench")
    folder = Path(tempfile.mkdtemp())
    try:
        settings = settings_in(folder)
        upgrade(settings.database.url)
        database = Database(settings.database)
        n_jobs, n_points = (1_000, 10_000) if options.quick else (N_JOBS, N_POINTS)
        large = fill(database, n_jobs, n_points)
        figures = measure(create_app(settings), large)
        database.close()
    finally:
        shutil.rmtree(folder)
    title = f"{n_jobs:,} jobs and adapters, {n_points:,} points; {describe_machine()}"
    table = Table("page", "server time", "bytes (gzip)", title=title)
    for path, found in figures.items():
        table.add_row(path, f"{found['ms']:.0f} ms", f"{found['bytes']:,.0f}")
    Console(width=120).print(table)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
