"""A service without its processes: SQLite, a directory as store, a tiny base model, one job."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from models.db import Database
from models.domain.reports import StepMetrics
from models.domain.training import TrainingSpec
from models.registry import base_models, files, job_runs, jobs, metrics
from models.registry.job_files import DataDemand
from models.settings import (
    DatabaseSettings,
    ModelSettings,
    Settings,
    StorageSettings,
    WorkerSettings,
)
from models.storage import LocalStore, upload_key
from models.tables import Adapter, Base, Checkpoint, Event, File, Job, Project
from worker.lint_files import FileLinter
from worker.training import methods, objectives
from worker.training.run import run_job
from worker.training.task import Stop
from worker.training.warm import WarmBase

PROJECT = "proj_test"


def chat_rows(n_rows: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What follows {number}?"},
                {"role": "assistant", "content": f"After {number} comes {number + 1}."},
            ]
        }
        for number in range(n_rows)
    ]


@dataclass
class Service:
    """What a trainer process meets, and shortcuts for tests to arrange and to look."""

    settings: Settings
    database: Database
    store: LocalStore

    @classmethod
    def open(cls, root: Path, base_directory: Path) -> "Service":
        """The service whose data lie below `root`, or will."""
        settings = Settings(
            database=DatabaseSettings(url=f"sqlite:///{root / 'tunery.db'}"),
            storage=StorageSettings(url=f"file:{root / 'objects'}"),
            models=ModelSettings(
                cache_dir=root / "base-models", catalog={"tiny": f"path:{base_directory}"}
            ),
            worker=WorkerSettings(scratch_dir=root / "scratch"),
        )
        return cls(settings, Database(settings.database), LocalStore(root / "objects"))

    @classmethod
    def create(cls, root: Path, base_directory: Path) -> "Service":
        """A new service below `root`, without a file."""
        service = cls.open(root, base_directory)
        Base.metadata.create_all(service.database.engine)
        with service.database.write() as session:
            session.add(Project(id=PROJECT, name="test"))
            base_models.sync_catalog(session, service.settings.models.catalog)
        return service

    def upload(self, file_id: str, rows: Sequence[Any]) -> None:
        """Store a file and lint it, as the worker's parent does."""
        data = "\n".join(json.dumps(row) for row in rows).encode()
        self.store.put(upload_key(file_id), data)
        with self.database.write() as session:
            files.create(
                session,
                File(
                    id=file_id,
                    project_id=PROJECT,
                    purpose="fine-tune",
                    filename=f"{file_id}.jsonl",
                    bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    object_key=upload_key(file_id),
                ),
            )
        assert FileLinter(self.database, self.store, self.settings.worker).lint_next()

    def submit(self, **changes: Any) -> Job:
        """Create a job, let it through validation and claim it; 16 tiny steps by default."""
        fields: dict[str, Any] = {
            "model": "tiny",
            "training_file": "file-train",
            "suffix": "numbers",
            "seed": 7,
            "hyperparameters": {"n_epochs": 2, "batch_size": 4},
            "objective": objectives.parse_params({"type": "sft"}).model_dump(),
            "peft": methods.parse_params({"type": "lora", "r": 4, "dropout": 0.1}).model_dump(),
            "precision": {"type": "fp32"},
            "max_seq_length": 128,
        }
        spec = TrainingSpec.model_validate({**fields, **changes})
        with self.database.write() as session:
            jobs.create(session, PROJECT, spec, None)
            jobs.advance_validated(session, lambda spec: DataDemand(frozenset({"chat"})))
        return self.claim()

    def requeue(self, job: Job, max_attempts: int = 5) -> Job:
        """What the parent does with a lost run; returns the job as its next attempt has it."""
        with self.database.write() as session:
            lost = job_runs.LostRun("worker_lost", "The trainer ended.")
            job_runs.requeue(session, job.id, job.attempt, lost, max_attempts)
        return self.claim()

    def claim(self) -> Job:
        with self.database.write() as session:
            job = job_runs.claim(session, "test-worker", 600)
            assert job is not None
            return job

    def run(
        self,
        job: Job,
        asked: Callable[[], Stop | None] = lambda: None,
        warm: WarmBase | None = None,
    ) -> int:
        return run_job(self.settings, job.id, job.attempt, asked, warm)

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def trace(self, job_id: str) -> list[StepMetrics]:
        with self.database.read() as session:
            return metrics.all_points(session, job_id)

    def keys(self, prefix: str) -> list[str]:
        return [info.key for info in self.store.list(prefix)]

    def messages(self, job_id: str) -> list[str]:
        with self.database.read() as session:
            query = select(Event.message).where(Event.job_id == job_id).order_by(Event.sequence)
            return list(session.scalars(query))

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """The checkpoints of a job, oldest first."""
        with self.database.read() as session:
            query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)
            return list(session.scalars(query))

    def adapters(self) -> list[Adapter]:
        with self.database.read() as session:
            return list(session.scalars(select(Adapter)))
