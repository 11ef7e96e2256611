"""The threads of a worker: a housekeeper, a linter, a postman, and one slot for each device.

Each looks in the database when it is rung and every few seconds anyway, so a lost bell costs a
short delay and never a job.
"""

import os
import random
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from importlib.metadata import version

import structlog
from sqlalchemy.exc import SQLAlchemyError

from models.db import Database
from models.registry import job_runs, workers
from models.settings import Settings, WebhookSettings, WorkerSettings
from models.storage import ObjectStore, open_store
from models.tables import Job
from models.webhook_sender import WebhookSender
from worker import companions, machine, tasks
from worker.deliveries import deliver_due
from worker.launch import Seat, TrainerProcess
from worker.lint_files import FileLinter
from worker.loops import compile_all
from worker.measure import measure_next
from worker.merging import merge_next

POSTMAN_SECONDS = 2.0
"""How often a worker looks for events to send: what writes them rings no bell."""

log = structlog.get_logger(__name__)

SWEEPS_ALIVE = 4
"""A worker that has not said for so many sweeps that it lives is taken off the list."""


class _Looker(threading.Thread, ABC):
    """A thread that looks for work when rung, and every `sweep_seconds` without a bell."""

    def __init__(self, name: str, sweep_seconds: float) -> None:
        super().__init__(name=name, daemon=True)
        self._sweep_seconds = sweep_seconds
        self._rung = threading.Event()
        self._stopping = threading.Event()

    def ring(self) -> None:
        self._rung.set()

    def stop(self) -> None:
        self._stopping.set()
        self._rung.set()

    def run(self) -> None:
        self.ring()
        while not self._stopping.is_set():
            # Jitter keeps many workers from asking the database in step.
            self._rung.wait(self._sweep_seconds * random.uniform(0.8, 1.2))
            self._rung.clear()
            try:
                while not self._stopping.is_set() and self.look():
                    pass
            except Exception:
                log.exception("look_failed", thread=self.name)
        self.close()

    @abstractmethod
    def look(self) -> bool:
        """Do what there is to do; return whether to look again at once."""

    def close(self) -> None:
        """Release what the thread holds; called by the thread at its end."""


class _Housekeeper(_Looker):
    """Takes over lost jobs, moves jobs on, clears away, and says that this worker lives."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        settings: WorkerSettings,
        slots: list["_Slot"],
        worker: str,
    ) -> None:
        super().__init__("housekeeper", settings.sweep_seconds)
        self._database = database
        self._store = store
        self._settings = settings
        self._slots = slots
        self._worker = worker
        self._announced_at = float("-inf")

    def look(self) -> bool:
        self._announce()
        n_queued = tasks.requeue_lost_jobs(self._database, self._settings)
        n_queued += tasks.advance_jobs(self._database)
        tasks.expire_uploads(self._database, self._store)
        if n_queued:
            for slot in self._slots:
                slot.ring()
        return False

    def _announce(self) -> None:
        """Say that this worker lives; not at every bell, since it asks the driver of the GPUs."""
        if time.monotonic() - self._announced_at < self._settings.sweep_seconds / 2:
            return
        self._announced_at = time.monotonic()
        announcement = workers.Announcement(
            worker_id=self._worker,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=version("tunery"),
            slots=len(self._slots),
            machine=machine.look(),
        )
        with self._database.write() as session:
            workers.announce(session, announcement, SWEEPS_ALIVE * self._settings.sweep_seconds)

    def close(self) -> None:
        try:
            with self._database.write() as session:
                workers.withdraw(session, self._worker)
        except SQLAlchemyError as error:  # the list forgets it by itself, a little later
            log.warning("worker_not_withdrawn", error=str(error))


class _Linter(_Looker):
    """Lints one upload after another, and has jobs looked at that may have waited for it."""

    def __init__(
        self, linter: FileLinter, settings: WorkerSettings, housekeeper: _Housekeeper
    ) -> None:
        super().__init__("linter", settings.sweep_seconds)
        self._linter = linter
        self._housekeeper = housekeeper

    def look(self) -> bool:
        has_linted = self._linter.lint_next()
        if has_linted:
            self._housekeeper.ring()
        return has_linted


class _Postman(_Looker):
    """Sends what lies in the outbox of webhooks."""

    def __init__(self, database: Database, settings: WebhookSettings) -> None:
        super().__init__("postman", POSTMAN_SECONDS)
        self._database = database
        self._sender = WebhookSender(settings)
        self._lease_seconds = 2 * settings.timeout_seconds

    def look(self) -> bool:
        return deliver_due(self._database, self._sender, self._lease_seconds) > 0


class _Slot(_Looker):
    """Trains one job at a time, or a few small ones together; keeps a warm trainer for the next."""

    def __init__(self, database: Database, settings: WorkerSettings, worker: str) -> None:
        super().__init__(f"slot-{worker}", settings.sweep_seconds)
        self._database = database
        self._settings = settings
        self._worker = worker
        self._spare: TrainerProcess | None = None
        self._device = machine.look().devices[0].type
        self._may_compile = self._device == "cpu"

    def look(self) -> bool:
        if self._settings.warm_spare:
            self._spare = self._warm()
        claimed = self._claim()
        if not claimed:
            return self._fill_time()
        trainer = self._warm()
        self._spare = None
        if len(claimed) == 1:
            self._run(claimed[0], trainer).watch()
        else:
            seats = trainer.seats([(job.id, job.attempt) for job in claimed])
            runs = [self._run(*each) for each in zip(claimed, seats, strict=True)]
            try:
                tasks.watch_together(runs)
            finally:
                trainer.kill()  # every end was told: it has nothing left to do but to exit
        return True

    def _fill_time(self) -> bool:
        """Do what a job would interrupt; return whether to look again at once."""
        is_stopping = self._stopping.is_set
        if merge_next(self._database, is_stopping) or measure_next(self._database, is_stopping):
            return True
        if self._may_compile:
            self._may_compile = not compile_all(self._database, is_stopping)
        return False

    def _claim(self) -> list[Job]:
        """Take the next job, and those that are trained beside it; none where nothing waits."""
        with self._database.write() as session:
            job = job_runs.claim(session, self._worker, self._settings.lease_seconds)
            if job is None:
                return []
            return [job, *companions.claim(session, job, self._settings, self._device)]

    def _run(self, job: Job, trainer: TrainerProcess | Seat) -> tasks.TrainingRun:
        return tasks.TrainingRun(
            self._database, self._settings, job, trainer, self._stopping.is_set
        )

    def _warm(self) -> TrainerProcess:
        if self._spare and self._spare.is_alive:
            return self._spare
        if not self._settings.warm_base:
            return TrainerProcess()
        with self._database.read() as session:
            return TrainerProcess(job_runs.last_base(session))

    def close(self) -> None:
        if self._spare is not None:
            self._spare.kill()


class Dispatcher:
    """All threads of one worker process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.worker
        self._database = Database(settings.database)
        store = open_store(settings.storage)
        worker = f"{socket.gethostname()}:{secrets.token_hex(4)}"
        self._slots = [
            _Slot(self._database, settings.worker, workers.slot_owner(worker, index))
            for index in range(settings.worker.slots)
        ]
        housekeeper = _Housekeeper(self._database, store, settings.worker, self._slots, worker)
        linter = FileLinter(self._database, store, settings.worker)
        self._threads: list[_Looker] = [
            housekeeper,
            _Linter(linter, settings.worker, housekeeper),
            _Postman(self._database, settings.webhooks),
            *self._slots,
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def ring(self) -> None:
        for thread in self._threads:
            thread.ring()

    def stop(self) -> None:
        """Ask every thread to end; running trainers save a checkpoint first."""
        for thread in self._threads:
            thread.stop()

    def join(self) -> None:
        """Wait until all threads have ended, at most as long as a trainer may take to stop."""
        for thread in self._threads:
            thread.join(self._settings.stop_seconds + 10)
        self._database.close()
