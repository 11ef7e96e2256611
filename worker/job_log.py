"""The log of a job: what its trainer writes to standard error, passed on and kept with the job."""

import os
import threading
import time
from typing import IO

import structlog
from sqlalchemy.exc import SQLAlchemyError

from models.db import Database
from models.registry import job_logs

log = structlog.get_logger(__name__)

READ_BYTES = 64 * 1024
MAX_HELD_BYTES = 1024 * 1024
KEEP_SECONDS = 1.0
END_SECONDS = 2.0
_STDERR = 2


class LogPipe:
    """Reads one trainer's standard error to its end and passes it on to this process's own.

    From `begin` on it also holds what comes, at most `MAX_HELD_BYTES`, until somebody takes it: a
    trainer never waits for a database.

    Args:
        source: The reading end of the trainer's pipe; closed at its end.
    """

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._held: bytearray | None = None
        self._n_dropped = 0
        self._passes_on = True
        self._thread = threading.Thread(target=self._read, name="trainer-log", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Hold what is written from now on: the trainer has a job."""
        with self._lock:
            self._held = bytearray()

    def take(self, *, at_end: bool = False) -> str:
        """Return what has come since the last time: whole lines, at the end of the trainer all.

        Args:
            at_end: The trainer has ended; waits a little for the last of what it wrote.
        """
        if at_end:
            self._thread.join(END_SECONDS)
        with self._lock:
            held = self._held or bytearray()
            size = len(held) if at_end or self._n_dropped else held.rfind(b"\n") + 1
            taken, n_dropped = bytes(held[:size]), self._n_dropped
            del held[:size]
            self._n_dropped = 0
        text = taken.decode(errors="replace")
        return f"[{n_dropped:,} bytes were not kept]\n{text}" if n_dropped else text

    def _read(self) -> None:
        with self._source:
            while chunk := os.read(self._source.fileno(), READ_BYTES):
                self._pass_on(chunk)
                with self._lock:
                    self._hold(chunk)

    def _hold(self, chunk: bytes) -> None:
        if self._held is None:
            return
        self._held += chunk
        excess = len(self._held) - MAX_HELD_BYTES
        if excess > 0:
            del self._held[:excess]
            self._n_dropped += excess

    def _pass_on(self, chunk: bytes) -> None:
        try:
            while self._passes_on and chunk:
                chunk = chunk[os.write(_STDERR, chunk) :]
        except OSError:
            # Nobody reads this process's own log any more; the trainer must not stand still for it.
            self._passes_on = False


class LogKeeper:
    """Writes what a trainer says to the log of its job, about once a second.

    Args:
        database: Where the job is.
        job_id: The job.
        attempt: The fencing token; lines of an older attempt are not kept.
        pipe: Of the trainer.
        keep_bytes: Most that is kept of the job's log.
    """

    def __init__(
        self, database: Database, job_id: str, attempt: int, pipe: LogPipe, keep_bytes: int
    ) -> None:
        self._database = database
        self._job = (job_id, attempt)
        self._pipe = pipe
        self._keep_bytes = keep_bytes
        self._unwritten = ""
        self._wrote_at = float("-inf")

    def keep(self, *, at_end: bool = False) -> None:
        """Write what is new; what the database does not take now is written the next time."""
        now = time.monotonic()
        if not at_end and now - self._wrote_at < KEEP_SECONDS:
            return
        self._wrote_at = now
        self._unwritten = (self._unwritten + self._pipe.take(at_end=at_end))[-MAX_HELD_BYTES:]
        if not self._unwritten:
            return
        try:
            with self._database.write() as session:
                job_logs.append(session, *self._job, self._unwritten, self._keep_bytes)
        except SQLAlchemyError as error:
            log.warning("job_log_not_written", job_id=self._job[0], error=str(error))
            return
        self._unwritten = ""
