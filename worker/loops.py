"""Compiling the loops of training and of the engine once, while this worker has no job.

It takes a minute after an installation, which the first job would otherwise wait for.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

from models.db import Database
from models.registry import job_runs
from models.settings import child_environment
from worker.kernels import cache
from worker.launch import WITHHELD

log = structlog.get_logger(__name__)

COMMAND = [sys.executable, "-m", "worker.kernels"]
POLL_SECONDS = 1.0


def compile_all(database: Database, is_stopping: Callable[[], bool]) -> bool:
    """Compile the loops that no process has compiled yet; return whether that has come to an end.

    A job that comes goes first: what is compiled until then stays, and the job compiles what it
    needs of the rest.
    """
    if cache.is_complete():
        return True
    started = time.monotonic()
    with subprocess.Popen(COMMAND, env=child_environment(without=WITHHELD)) as child:
        try:
            while child.poll() is None:
                if is_stopping():
                    return False
                with database.read() as session:
                    if job_runs.has_queued(session):
                        return False
                with suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_SECONDS)
        finally:
            child.kill()
    seconds = round(time.monotonic() - started, 1)
    if child.returncode == 0:
        log.info("loops_compiled", seconds=seconds)
    else:
        log.warning("loops_not_compiled", exit_status=child.returncode, seconds=seconds)
    return True
