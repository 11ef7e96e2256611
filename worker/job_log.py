"""The log of a job: what its trainer writes to standard error, passed on and kept with the job."""

import os
import re
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
_JOB = re.compile(rb'"job_id": "([^"]*)"')
"""How a line of our own says which job it is about (``models.logs``)."""


class _Held:
    """Lines of one job that nobody has taken yet, at most `MAX_HELD_BYTES`."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._n_dropped = 0

    def add(self, line: bytes) -> None:
        self._text += line
        excess = len(self._text) - MAX_HELD_BYTES
        if excess > 0:
            del self._text[:excess]
            self._n_dropped += excess

    def take(self) -> str:
        text, n_dropped = self._text.decode(errors="replace"), self._n_dropped
        self._text.clear()
        self._n_dropped = 0
        return f"[{n_dropped:,} bytes were not kept]\n{text}" if n_dropped else text


class LogPipe:
    """Reads one trainer's standard error to its end and passes it on to this process's own.

    It also holds the lines of the trainer's jobs, from `begin` on, until somebody takes them: a
    trainer never waits for a database. A line that names another job is not among a job's.

    Args:
        source: The reading end of the trainer's pipe; closed at its end.
    """

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._jobs: dict[str, _Held] = {}
        self._passes_on = True
        self._thread = threading.Thread(target=self._read, name="trainer-log", daemon=True)
        self._thread.start()

    def begin(self, job_id: str) -> None:
        """Hold the lines of a job from now on: the trainer is given it."""
        with self._lock:
            self._jobs[job_id] = _Held()

    def take(self, job_id: str, *, at_end: bool = False) -> str:
        """Return the lines of a job that have come since the last time.

        Args:
            job_id: The job; one that has not begun has none.
            at_end: The trainer has ended; waits a little for the last of what it wrote.
        """
        if at_end:
            self._thread.join(END_SECONDS)
        with self._lock:
            held = self._jobs.get(job_id)
            return "" if held is None else held.take()

    def _read(self) -> None:
        rest = b""
        with self._source:
            while chunk := os.read(self._source.fileno(), READ_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                self._hold([line + b"\n" for line in lines])
                if len(rest) > READ_BYTES:
                    self._hold([rest])
                    rest = b""
                self._pass_on(chunk)
            self._hold([rest])

    def _hold(self, lines: list[bytes]) -> None:
        with self._lock:
            for line in lines:
                named = _JOB.search(line)
                for job_id, held in self._jobs.items():
                    if named is None or named[1] == job_id.encode():
                        held.add(line)

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
        self._unwritten = (self._unwritten + self._pipe.take(self._job[0], at_end=at_end))[
            -MAX_HELD_BYTES:
        ]
        if not self._unwritten:
            return
        try:
            with self._database.write() as session:
                job_logs.append(session, *self._job, self._unwritten, self._keep_bytes)
        except SQLAlchemyError as error:
            log.warning("job_log_not_written", job_id=self._job[0], error=str(error))
            return
        self._unwritten = ""
