"""Progress of a run as rows: metrics, events, the job's step and estimated end."""

import time

from models.db import Database
from models.domain.reports import StepMetrics
from models.domain.status import EventLevel
from models.registry import events, job_runs, metrics
from worker.training.task import Progress

FLUSH_SECONDS = 1.0


class DatabaseReporter:
    """Buffers steps and writes them in one short fenced transaction, at most every second.

    Args:
        database: Where the job's row is.
        job_id: The job.
        attempt: The fencing token: every write fails once the job has a newer attempt.
        flush_seconds: Shortest time between two writes.
    """

    def __init__(
        self, database: Database, job_id: str, attempt: int, flush_seconds: float = FLUSH_SECONDS
    ) -> None:
        self._database = database
        self._job_id = job_id
        self._attempt = attempt
        self._flush_seconds = flush_seconds
        self._waiting: list[StepMetrics] = []
        self._values: dict[str, float | int | None] = {}
        self._total_steps = 0
        self._flushed_at = float("-inf")
        self._first: tuple[int, float] | None = None

    def untrained(self, loss: float, accuracy: float, total_steps: int) -> None:
        """Add an event with the validation scores of step 0. Raises `LeaseLostError`."""
        data = {
            "step": 0,
            "total_steps": total_steps,
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": accuracy,
        }
        message = f"Step 0/{total_steps}: full validation loss={loss:.2f}"
        with self._database.write() as session:
            job_runs.fence(session, self._job_id, self._attempt, total_steps=total_steps)
            events.append(session, self._job_id, message, data=data)

    def step(self, metrics: StepMetrics, progress: Progress, total_steps: int) -> None:
        """Take the metrics of one step. Raises `LeaseLostError` when a write finds it so."""
        self._waiting.append(metrics.model_copy(update={"recorded_at": time.time()}))
        self._total_steps = total_steps
        self._values = {
            "step": progress.step,
            "total_steps": total_steps,
            "trained_tokens": progress.n_tokens,
            "estimated_finish": self._estimate(progress.step),
        }
        if time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what waits; called before a checkpoint, whose step must have its metrics."""
        if not self._waiting:
            return
        with self._database.write() as session:
            job_runs.fence(session, self._job_id, self._attempt, **self._values)
            metrics.record(session, self._job_id, self._attempt, self._waiting, self._total_steps)
        self._waiting = []
        self._flushed_at = time.monotonic()

    def warn(self, message: str) -> None:
        """Add a warning to the job's events."""
        with self._database.write() as session:
            job_runs.fence(session, self._job_id, self._attempt)
            events.append(session, self._job_id, message, level=EventLevel.WARN)

    def _estimate(self, step: int) -> float | None:
        """Return when the last step will end, in seconds since 1970, once there are two steps."""
        now = time.time()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, first_time = self._first
        return now + (self._total_steps - step) * (now - first_time) / (step - first_step)


class Silence:
    """Takes what a reporter takes and tells nobody: rank 0 speaks for a job on several devices."""

    def untrained(self, loss: float, accuracy: float, total_steps: int) -> None: ...

    def step(self, metrics: StepMetrics, progress: Progress, total_steps: int) -> None: ...

    def flush(self) -> None: ...

    def warn(self, message: str) -> None: ...
