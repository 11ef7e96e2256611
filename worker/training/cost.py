"""What a run takes: reckoned when its rows are known, measured at its end.

The difference corrects later estimates (``models.domain.estimates``).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from models.db import Database
from models.domain.estimates import (
    BaseShape,
    Corrections,
    Estimate,
    Measured,
    Probe,
    RowLengths,
    estimate,
    sample_of,
)
from models.registry import job_runs, probes
from worker.training.memory import peak_bytes
from worker.training.model import describe_device
from worker.training.task import Task


class CostMeter:
    """Times one attempt, from its making on.

    Args:
        database: Where estimates and measurements are kept.
        job_id: The job.
        attempt: The fencing token.
    """

    def __init__(self, database: Database, job_id: str, attempt: int) -> None:
        self._database = database
        self._job_id = job_id
        self._attempt = attempt
        self._started = time.perf_counter()
        self._train_seconds = 0.0
        self._reckoned: Estimate | None = None

    def reckon(self, task: Task, shape: BaseShape) -> None:
        """Record the estimate of the job, if its base model has been measured."""
        spec, device = task.spec, describe_device(task.device)
        with self._database.write() as session:
            row = probes.get(session, spec.model, spec.precision.type)
            if row is None or row.values is None:
                return
            probe = Probe.model_validate(row.values)
            known = probes.corrections(session, spec.model, spec.precision.type, device)
            n_adapter = task.method.count_parameters(shape, task.method_params)
            rows = row_lengths(task)
            corrected = estimate(spec, shape, n_adapter, rows, probe, known)
            job_runs.record_estimate(session, self._job_id, self._attempt, corrected)
        self._reckoned = estimate(spec, shape, n_adapter, rows, probe, Corrections())

    @contextmanager
    def training(self) -> Iterator[None]:
        """Time the training loop."""
        started = time.perf_counter()
        yield
        self._train_seconds = time.perf_counter() - started

    def record(self, task: Task) -> None:
        """Keep what the run has taken; for one that was not resumed."""
        reckoned = self._reckoned
        measured = Measured(
            device=describe_device(task.device),
            precision=task.spec.precision.type,
            peak_bytes=peak_bytes(task.device),
            seconds=time.perf_counter() - self._started,
            train_seconds=self._train_seconds,
            reckoned_peak_bytes=reckoned and reckoned.peak_bytes,
            reckoned_train_seconds=reckoned and reckoned.train_seconds,
        )
        with self._database.write() as session:
            job_runs.record_measured(session, self._job_id, self._attempt, measured)


def row_lengths(task: Task) -> RowLengths:
    """Return the lengths of a task's rows; the trained share is that of the first thousand."""
    lengths = getattr(task.train, "lengths", None)
    if lengths is None:
        lengths = np.array([len(example.input_ids) for example in task.train])
    some = [task.train[row] for row in range(min(1000, len(task.train)))]
    return RowLengths(
        n_rows=len(task.train),
        n_held_out=len(task.valid),
        sample=sample_of(lengths.tolist()),
        trained_share=sum(each.n_trained for each in some)
        / sum(len(each.input_ids) for each in some),
    )
