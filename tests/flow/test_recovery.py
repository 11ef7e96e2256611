"""Workers that are killed, messages that are doubled: the job is trained once, to its end."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from api.cli.migrate import upgrade
from models.broker import Bell, make_celery
from models.db import Database
from models.domain.status import FileStatus, JobStatus
from models.domain.training import TrainingSpec
from models.registry import base_models, job_logs, jobs, tenancy
from models.settings import BrokerSettings, DatabaseSettings
from models.storage import LocalStore, upload_key
from models.tables import Adapter, Checkpoint, Event, File, Job, JobAttempt, Metric
from tests.flow.conftest import HARBOUR_DESK, process, wait_until
from worker.training import methods, objectives

N_EPOCHS = 20
LEASE_SECONDS = 3


class Stage:
    """A database, a store and a broker, without an API; workers are started by the tests."""

    def __init__(
        self, folder: Path, url: str, broker_url: str, tiny_model: Path, cache: Path
    ) -> None:
        self.folder = folder
        upgrade(url)
        self.database = Database(DatabaseSettings(url=url))
        self.store = LocalStore(folder / "objects")
        self.broker_url = broker_url
        self.catalog = {"tiny": f"path:{tiny_model}"}
        self._cache = cache
        self._n_workers = 0
        with self.database.write() as session:
            base_models.sync_catalog(session, self.catalog)

    def submit(self, **numbers: int) -> str:
        """Add a job, whose file is still to be linted if it is the first one; return its id."""
        content = b"".join(HARBOUR_DESK.read_bytes().splitlines(keepends=True)[:16])
        with self.database.write() as session:
            project = tenancy.default_project(session)
            file = session.get(File, "file-rows") or File(
                id="file-rows",
                project_id=project.id,
                purpose="fine-tune",
                filename="rows.jsonl",
                bytes=len(content),
                sha256="",
                object_key=upload_key("file-rows"),
                status=FileStatus.UPLOADED,
            )
            self.store.put(upload_key(file.id), content)
            session.add(file)
            spec = TrainingSpec.model_validate(
                {
                    "model": "tiny",
                    "training_file": file.id,
                    "seed": 3,
                    "hyperparameters": {"n_epochs": N_EPOCHS, "batch_size": 8, **numbers},
                    "objective": objectives.parse_params({"type": "sft"}).model_dump(),
                    "peft": methods.parse_params({"type": "lora", "r": 4}).model_dump(),
                    "precision": {"type": "fp32"},
                    "checkpoint_steps": 5,
                }
            )
            return jobs.create(session, project.id, spec, None).id

    @contextmanager
    def worker(self) -> Iterator[psutil.Popen]:
        self._n_workers += 1
        environment = {
            "TUNERY_DATABASE__URL": self.database.engine.url.render_as_string(hide_password=False),
            "TUNERY_BROKER__URL": self.broker_url,
            "TUNERY_STORAGE__URL": f"file:{self.store.root}",
            "TUNERY_MODELS__CACHE_DIR": str(self._cache),
            "TUNERY_MODELS__CATALOG": f'{{"tiny": "{self.catalog["tiny"]}"}}',
            "TUNERY_WORKER__SCRATCH_DIR": str(self.folder / "scratch"),
            "TUNERY_WORKER__JOINT_JOBS": "4",
            "TUNERY_WORKER__LEASE_SECONDS": str(LEASE_SECONDS),
            "TUNERY_WORKER__HEARTBEAT_SECONDS": "1",
            "TUNERY_WORKER__SWEEP_SECONDS": "1",
        }
        log = self.folder / f"worker-{self._n_workers}.log"
        with process("worker", environment, log) as running:
            yield running

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def all(self, table: type[Any]) -> list[Any]:
        with self.database.read() as session:
            return list(session.scalars(select(table)))

    def wait_for_job(self, job_id: str, condition: Callable[[Job], object], what: str) -> Job:
        wait_until(lambda: condition(self.job(job_id)), 120, what)
        return self.job(job_id)

    def outcomes(self) -> dict[int, str | None]:
        """Return how each attempt ended; the worker notes it a moment after the job's end."""
        wait_until(lambda: all(row.outcome for row in self.all(JobAttempt)), 10, "the outcomes")
        return {row.attempt: row.outcome for row in self.all(JobAttempt)}

    def logs(self) -> str:
        return "\n".join(path.read_text()[-4000:] for path in self.folder.glob("worker-*.log"))


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, tmp_path: Path, valkey_url: str, tiny_model: Path
) -> Iterator[Stage]:
    """A stage on SQLite, or on the database whose fixture the test names."""
    url = f"sqlite:///{tmp_path / 'tunery.db'}"
    if hasattr(request, "param"):
        url = request.getfixturevalue(request.param)
    made = Stage(tmp_path, url, valkey_url, tiny_model, tmp_path / "base-models")
    yield made
    made.database.close()


on_postgresql = pytest.mark.parametrize("stage", ["postgres_url"], indirect=True)


def trainer_of(worker: psutil.Popen, job: JobAttempt) -> psutil.Process:
    return next(child for child in worker.children() if child.pid == job.trainer_pid)


def metrics(stage: Stage) -> dict[int, float]:
    return {row.step: row.values["train_loss"] for row in stage.all(Metric)}


def has_checkpoint(job: Job) -> bool:
    return job.step >= 7


def test_a_job_of_a_killed_worker_is_continued_by_another_from_its_checkpoint(
    stage: Stage,
) -> None:
    job_id = stage.submit()
    with stage.worker() as first:
        stage.wait_for_job(job_id, has_checkpoint, "some steps")
        trainer = trainer_of(first, stage.all(JobAttempt)[0])
        first.kill()
        wait_until(lambda: not trainer.is_running(), 5, "the end of the killed worker's trainer")
    at_death = stage.job(job_id)
    assert at_death.status == JobStatus.RUNNING  # nobody has noticed yet
    assert at_death.step < 2 * N_EPOCHS
    with stage.worker():
        ended = stage.wait_for_job(job_id, lambda job: JobStatus(job.status).is_terminal, "the end")
    assert ended.status == JobStatus.SUCCEEDED, stage.logs()
    assert ended.attempt == 2
    assert len(stage.all(Adapter)) == 1
    assert sorted(metrics(stage)) == list(range(1, 2 * N_EPOCHS + 1))
    resumed = {row.step: row.attempt for row in stage.all(Metric)}
    assert resumed[1] == 1  # it did not start anew
    assert resumed[2 * N_EPOCHS] == 2
    warnings = [event.message for event in stage.all(Event) if event.level == "warn"]
    assert any("continues from step" in message for message in warnings)


# A frozen process that happens to be writing would hold the one lock of an SQLite file for ever.
@on_postgresql
def test_a_frozen_worker_that_wakes_after_its_lease_changes_nothing(stage: Stage) -> None:
    job_id = stage.submit()
    with stage.worker() as first:
        stage.wait_for_job(job_id, has_checkpoint, "some steps")
        trainer = trainer_of(first, stage.all(JobAttempt)[0])
        frozen = [first, *first.children(recursive=True)]
        for member in frozen:
            member.send_signal(signal.SIGSTOP)
        with stage.worker():
            stage.wait_for_job(job_id, lambda job: job.attempt == 2, "a second attempt")
            for member in frozen:
                member.send_signal(signal.SIGCONT)
            wait_until(lambda: not trainer.is_running(), 15, "the end of the woken trainer")
            ended = stage.wait_for_job(
                job_id, lambda job: JobStatus(job.status).is_terminal, "the end"
            )
            outcomes = stage.outcomes()
    assert ended.status == JobStatus.SUCCEEDED, stage.logs()
    assert ended.attempt == 2
    assert len(stage.all(Adapter)) == 1
    assert outcomes == {1: "lease_lost", 2: "succeeded"}
    last = max(stage.all(Checkpoint), key=lambda checkpoint: checkpoint.step)
    assert last.attempt == 2


def test_a_worker_that_is_told_to_stop_saves_a_checkpoint_and_gives_the_job_back(
    stage: Stage,
) -> None:
    job_id = stage.submit()
    with stage.worker() as first:
        stage.wait_for_job(job_id, has_checkpoint, "some steps")
        first.terminate()
        assert first.wait(60) == 0, stage.logs()
    given_back = stage.job(job_id)
    assert given_back.status == JobStatus.QUEUED
    newest = max(stage.all(Checkpoint), key=lambda checkpoint: checkpoint.step)
    assert newest.step == given_back.step  # not a single step is lost
    with stage.worker():
        ended = stage.wait_for_job(job_id, lambda job: JobStatus(job.status).is_terminal, "the end")
    assert ended.status == JobStatus.SUCCEEDED, stage.logs()


def test_a_worker_logs_what_it_does_and_not_each_ring(stage: Stage) -> None:
    bell = Bell(make_celery(BrokerSettings.model_validate({"url": stage.broker_url})))
    with stage.worker():
        job_id = stage.submit(n_epochs=1)
        bell.ring()
        stage.wait_for_job(job_id, lambda job: JobStatus(job.status).is_terminal, "the end")
        stage.outcomes()
    lines = (stage.folder / "worker-1.log").read_text().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    own = [line["event"] for line in logged if line.get("process") == "worker"]
    assert "training_started" in own, stage.logs()
    assert "training_ended" in own
    noisy = {"celery", "kombu", "amqp"}
    assert not [line for line in logged if line["logger"].split(".")[0] in noisy]


def test_doubled_bells_and_two_workers_train_a_job_once(stage: Stage) -> None:
    bell = Bell(make_celery(BrokerSettings.model_validate({"url": stage.broker_url})))
    with stage.worker(), stage.worker():
        job_id = stage.submit()
        for _ in range(10):
            bell.ring()
        ended = stage.wait_for_job(job_id, lambda job: JobStatus(job.status).is_terminal, "the end")
        for _ in range(10):
            bell.ring()
        outcomes = stage.outcomes()
    assert ended.status == JobStatus.SUCCEEDED, stage.logs()
    assert ended.attempt == 1
    assert outcomes == {1: "succeeded"}
    assert len(stage.all(Adapter)) == 1


def test_a_running_job_is_cancelled_at_its_next_step(stage: Stage) -> None:
    job_id = stage.submit()
    with stage.worker() as worker:
        stage.wait_for_job(job_id, lambda job: job.step >= 3, "some steps")
        with stage.database.write() as session:
            jobs.cancel(session, stage.job(job_id).project_id, job_id)
        ended = stage.wait_for_job(job_id, lambda job: JobStatus(job.status).is_terminal, "the end")
        attempt = stage.all(JobAttempt)[0]
        wait_until(
            lambda: attempt.trainer_pid not in [child.pid for child in worker.children()],
            10,
            "the trainer's end",
        )
    assert ended.status == JobStatus.CANCELLED, stage.logs()
    assert ended.step < 2 * N_EPOCHS
    with stage.database.read() as session:
        kept = job_logs.read(session, job_id, 0, 100_000).text
    assert '"event": "trainer_ended"' in kept
    assert job_id in kept
    assert stage.all(Adapter) == []


def test_a_paused_job_goes_on_where_it_stopped(stage: Stage) -> None:
    job_id = stage.submit()
    with stage.worker():
        stage.wait_for_job(job_id, lambda job: job.step >= 3, "some steps")
        with stage.database.write() as session:
            jobs.pause(session, stage.job(job_id).project_id, job_id)
        paused = stage.wait_for_job(job_id, lambda job: job.status == JobStatus.PAUSED, "the pause")
        assert stage.outcomes() == {1: "paused"}
        newest = max(stage.all(Checkpoint), key=lambda checkpoint: checkpoint.step)
        assert newest.step == paused.step < 2 * N_EPOCHS
        with stage.database.write() as session:
            jobs.resume(session, paused.project_id, job_id)
        ended = stage.wait_for_job(job_id, lambda job: JobStatus(job.status).is_terminal, "the end")
    assert ended.status == JobStatus.SUCCEEDED, stage.logs()
    ran = {row.step: row.attempt for row in stage.all(Metric)}
    assert ran == {step: 1 if step <= paused.step else 2 for step in range(1, 2 * N_EPOCHS + 1)}


def test_small_jobs_share_a_trainer_and_each_has_an_end_of_its_own(stage: Stage) -> None:
    ids = [stage.submit(n_epochs=8, batch_size=2) for _ in range(2)]
    with stage.worker() as worker:
        for job_id in ids:
            stage.wait_for_job(job_id, has_checkpoint, "some steps")
        [trainer] = {row.trainer_pid for row in stage.all(JobAttempt)}
        psutil.Process(trainer).kill()
        for job_id in ids:
            stage.wait_for_job(job_id, lambda job: job.attempt == 2, "a second attempt")
        with stage.database.write() as session:
            jobs.cancel(session, stage.job(ids[1]).project_id, ids[1])
        ends = [
            stage.wait_for_job(each, lambda job: JobStatus(job.status).is_terminal, "the end")
            for each in ids
        ]
        wait_until(lambda: all(row.outcome for row in stage.all(JobAttempt)), 10, "the outcomes")
        rows = {(row.job_id, row.attempt): row for row in stage.all(JobAttempt)}
        assert worker.is_running()
    assert [job.status for job in ends] == [JobStatus.SUCCEEDED, JobStatus.CANCELLED], stage.logs()
    assert len({rows[each, 2].trainer_pid for each in ids} | {trainer}) == 2
    assert {key: row.outcome for key, row in rows.items()} == {
        (ids[0], 1): "requeued",
        (ids[1], 1): "requeued",
        (ids[0], 2): "succeeded",
        (ids[1], 2): "cancelled",
    }
    steps = {row.step: row.attempt for row in stage.all(Metric) if row.job_id == ids[0]}
    assert sorted(steps) == list(range(1, 65))
    assert (steps[1], steps[64]) == (1, 2)  # it went on where it was


def test_jobs_start_without_a_broker(stage: Stage) -> None:
    stage.broker_url = f"redis+socket://{stage.folder / 'nobody.sock'}"
    job_id = stage.submit()
    with stage.worker() as worker:
        ended = stage.wait_for_job(job_id, lambda job: JobStatus(job.status).is_terminal, "the end")
        assert ended.status == JobStatus.SUCCEEDED, stage.logs()
        worker.terminate()
        assert worker.wait(15) == 0
