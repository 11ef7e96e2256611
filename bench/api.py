"""The API beside a bare FastAPI app: jobs read, listed and created, and 1,000 readers of a stream.

Each side is one process on the same SQLite file; the load comes from this process.
"""

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert

from api.cli.migrate import upgrade
from bench._api_load import Load, load, percentile, request
from bench._api_stream import Crowd, Lag, Written, lags
from bench._report import describe_machine, parse_options, print_figures
from models.db import Database
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import base_models, events, job_runs, jobs, tenancy
from models.settings import DatabaseSettings, child_environment
from models.tables import File, Job
from tests.services import run_valkey

STREAMS = 8
FEW, MANY = 100, 100_000
READERS = 1000
EVENTS = 40
EVENT_SECONDS = 0.4
MARK = b"bench event "


@dataclass(frozen=True, slots=True)
class World:
    """A database with jobs, and a key."""

    database: Database
    path: Path
    project_id: str
    key: str
    broker_url: str


@contextmanager
def world(folder: Path, n_jobs: int, broker_url: str) -> Iterator[World]:
    """Make a database with `n_jobs` jobs of one project."""
    path = folder / f"{n_jobs}.db"
    upgrade(f"sqlite:///{path}")
    database = Database(DatabaseSettings(url=f"sqlite:///{path}"))
    with database.write() as session:
        base_models.sync_catalog(session, {"base": "path:/nowhere"})
        project = tenancy.default_project(session)
        _, key = tenancy.create_key(session, project.id, "bench")
        file = File(
            id="file-bench",
            project_id=project.id,
            purpose="fine-tune",
            filename="rows.jsonl",
            bytes=4096,
            sha256="0" * 64,
            object_key="files/file-bench",
            status="processed",
        )
        session.add(file)
        session.flush()
        now = time.time()
        rows = [
            {
                "id": f"ftjob-{number:024d}",
                "project_id": project.id,
                "status": JobStatus.SUCCEEDED,
                "base_model": "base",
                "training_file": file.id,
                "spec": _spec().model_dump(mode="json"),
                "created_at": now - number,
            }
            for number in range(n_jobs)
        ]
        for start in range(0, n_jobs, 5000):
            session.execute(insert(Job), rows[start : start + 5000])
    yield World(database, path, project.id, key, broker_url)
    database.close()


def _spec() -> TrainingSpec:
    return TrainingSpec(
        model="base",
        training_file="file-bench",
        seed=1,
        objective={"type": "sft"},
        peft={"type": "lora", "r": 16},
    )


@contextmanager
def running(command: list[str], port: int, environment: dict[str, str]) -> Iterator[psutil.Process]:
    """Run a server until the block ends; yields it once it listens."""
    process = subprocess.Popen(
        [sys.executable, *command], env=child_environment(environment), stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def ours(made: World, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    port = _free_port()
    environment = {
        "TUNERY_DATABASE__URL": f"sqlite:///{made.path}",
        "TUNERY_STORAGE__URL": f"file:{folder / 'objects'}",
        "TUNERY_BROKER__URL": made.broker_url,
        "TUNERY_INFERENCE__TOKEN": "bench",
        "TUNERY_MODELS__CATALOG": json.dumps({"base": "path:/nowhere"}),
        "TUNERY_API__PORT": str(port),
        "TUNERY_LOG_LEVEL": "WARNING",
    }
    with running(["-m", "api.cli", "api"], port, environment) as process:
        yield f"http://127.0.0.1:{port}", process


@contextmanager
def bare(made: World) -> Iterator[tuple[str, psutil.Process]]:
    port = _free_port()
    with running(["-m", "bench._api_bare", str(made.path), str(port)], port, {}) as process:
        yield f"http://127.0.0.1:{port}", process


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Side:
    """What a server did under a load; `cpu_s` is its processor time for a request."""

    load: Load
    cpu_s: float


def measure(made: World, folder: Path, seconds: float) -> dict[str, tuple[Side, Side]]:
    """Return what both sides do under each load: ours, bare."""
    job_id = f"ftjob-{0:024d}"
    body = json.dumps({"model": "base", "training_file": "file-bench", "seed": 1}).encode()
    ways: dict[str, tuple[str, str, bytes]] = {
        "GET a job": ("GET", f"/jobs/{job_id}", b""),
        "list 20 jobs": ("GET", "/jobs", b""),
        "create a job": ("POST", "/jobs", body),
    }
    found: dict[str, tuple[Side, Side]] = {}
    with ours(made, folder) as us, bare(made) as them:
        for name, (method, path, content) in ways.items():
            sides = []
            for (base, process), prefix in ((us, "/v1/fine_tuning"), (them, "")):
                sent = request(method, prefix + path, made.key, content)
                asyncio.run(load(base, sent, seconds / 4, STREAMS))  # warm
                before = _cpu_s(process)
                done = asyncio.run(load(base, sent, seconds, STREAMS))
                sides.append(Side(done, (_cpu_s(process) - before) / done.n_requests))
            found[name] = (sides[0], sides[1])
    return found


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@dataclass(frozen=True, slots=True)
class Streamed:
    """Of a stream with many readers: how long each event took to them, and who stays."""

    lags: list[Lag]
    cpu_s: float
    left_after_2_s: int

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile over all events and all readers."""
        return 1000 * percentile([each for lag in self.lags for each in lag.readers_s], percent)

    def __str__(self) -> str:
        parts = {
            "commit": [lag.commit_s for lag in self.lags],
            "first reader": [lag.readers_s[0] for lag in self.lags],
            "last reader": [lag.readers_s[-1] for lag in self.lags],
        }
        told = (
            f"{name} {1000 * percentile(values, 50):.0f} (at most {1000 * max(values):.0f})"
            for name, values in parts.items()
        )
        return (
            f"{READERS} readers of one stream, {len(self.lags)} events: "
            f"lag p50 {self.percentile_ms(50):.0f} ms, p99 {self.percentile_ms(99):.0f} ms; "
            f"median of events in ms: {', '.join(told)}; "
            f"server's processor time for an event {1000 * self.cpu_s:.0f} ms; "
            f"{self.left_after_2_s} connections left 2 s after they went away"
        )


def stream(made: World, folder: Path, n_events: int) -> Streamed:
    """Write events to a running job that `READERS` clients follow."""
    with made.database.write() as session:
        job = jobs.create(session, made.project_id, _spec(), None)
        jobs.move(session, job.id, JobStatus.QUEUED)
        job_runs.claim(session, "bench", 600)
    written = []
    with ours(made, folder) as (url, process):
        head = request("GET", f"/v1/fine_tuning/jobs/{job.id}/stream", made.key)
        before = len(process.net_connections())
        crowd = Crowd(url, head, READERS)
        crowd.listen(1)
        used = _cpu_s(process)
        for number in range(n_events):
            with made.database.write() as session:
                events.append(session, job.id, f"{MARK.decode()}{number} ")
                about_to = time.time()
            written.append(Written(about_to, time.time()))
            crowd.listen(EVENT_SECONDS)
        used = _cpu_s(process) - used
        readers = crowd.leave()
        time.sleep(2)
        left = len(process.net_connections()) - before
        httpx.get(f"{url}/healthz").raise_for_status()
    return Streamed(lags(readers, written, MARK), used / n_events, max(0, left))


def main() -> None:
    options = parse_options(__doc__, stream="measure only the readers of a stream")
    seconds = 2.0 if options.quick else 5.0
    table = Table("load", "jobs", "requests/s", "bare", "ratio", title=describe_machine())
    for heading in ("p50, ms", "p99, ms", "bare p99, ms", "CPU, ms", "bare CPU, ms"):
        table.add_column(heading)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, run_valkey(Path(name)) as broker:
        folder = Path(name)
        for n_jobs in (FEW,) if options.stream else (FEW, MANY):
            with world(folder, n_jobs, broker.url) as made:
                sides = {} if options.stream else measure(made, folder, seconds)
                for load_name, (us, them) in sides.items():
                    ratio = us.load.requests_per_s / them.load.requests_per_s
                    figures[f"{load_name}, {n_jobs}: ratio"] = ratio
                    figures[f"{load_name}, {n_jobs}: p99 ms"] = 1000 * us.load.p99_s
                    cells = [us.load.requests_per_s, them.load.requests_per_s]
                    times = (us.load.p50_s, us.load.p99_s, them.load.p99_s, us.cpu_s, them.cpu_s)
                    table.add_row(
                        load_name,
                        f"{n_jobs:,}",
                        *(f"{value:.0f}" for value in cells),
                        f"{ratio:.2f}",
                        *(f"{1000 * value:.1f}" for value in times),
                    )
                if n_jobs == FEW:
                    streamed = stream(made, folder, EVENTS)
    Console().print(table)
    Console().print(str(streamed), soft_wrap=True)
    figures["lag p99 ms"] = streamed.percentile_ms(99)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
