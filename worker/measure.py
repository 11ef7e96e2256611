"""Measuring base models for estimates, while this worker has no job."""

import subprocess
import sys
import time
from collections.abc import Callable
from os import getpid

import structlog
from pydantic import ValidationError

from models.db import Database
from models.domain.estimates import Probe
from models.registry import job_runs, probes
from models.settings import child_environment
from models.tables import BaseProbe
from worker.launch import MEMORY_ENVIRONMENT, WITHHELD

log = structlog.get_logger(__name__)

SECONDS = 600.0
"""A probe that takes longer is given up."""
POLL_SECONDS = 1.0
_PROBE = "worker.training.probe"


def measure_next(database: Database, is_stopping: Callable[[], bool]) -> bool:
    """Measure one base model that somebody wants an estimate of; return whether there was one.

    A job that comes goes first: the measurement is then left for later.
    """
    with database.write() as session:
        row = probes.claim(session, SECONDS)
    if row is None:
        return False
    with subprocess.Popen(
        [sys.executable, "-m", _PROBE, row.base_model, row.precision, str(getpid())],
        stdout=subprocess.PIPE,
        env=child_environment(without=WITHHELD) | MEMORY_ENVIRONMENT,
    ) as child:
        try:
            return _watch(database, row, child, is_stopping)
        finally:
            child.kill()


def _watch(
    database: Database,
    row: BaseProbe,
    child: "subprocess.Popen[bytes]",
    is_stopping: Callable[[], bool],
) -> bool:
    started = time.monotonic()
    while True:
        try:
            answer, _ = child.communicate(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            with database.write() as session:
                if is_stopping() or job_runs.has_queued(session):
                    probes.give_back(session, row)
                    return False
                if time.monotonic() - started > SECONDS:
                    probes.record_failure(session, row, f"It took more than {SECONDS:.0f} s.")
                    return True
    log.info("base_measured", base_model=row.base_model, exit_status=child.returncode)
    with database.write() as session:
        try:
            probes.record(session, row, Probe.model_validate_json(answer))
        except ValidationError:
            reason = f"The measurement ended with exit status {child.returncode}; see the log."
            probes.record_failure(session, row, reason)
    return True
