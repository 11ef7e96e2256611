"""Making merged models, while this worker has no job."""

import subprocess
import sys
import time
from collections.abc import Callable
from os import getpid

import structlog

from models.db import Database
from models.registry import merges
from models.settings import child_environment
from worker.launch import WITHHELD

log = structlog.get_logger(__name__)

SECONDS = 3600.0
"""A merge that takes longer is given up."""
POLL_SECONDS = 1.0
_MERGE = "worker.training.merge"


def merge_next(database: Database, is_stopping: Callable[[], bool]) -> bool:
    """Make one merged model that somebody wants, in a child; return whether there was one.

    A worker that is told to stop leaves it to another.
    """
    with database.write() as session:
        merge = merges.claim(session, SECONDS)
    if merge is None:
        return False
    with subprocess.Popen(
        [sys.executable, "-m", _MERGE, merge.id, str(getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=child_environment(without=WITHHELD),
    ) as child:
        try:
            reason = _watch(child, is_stopping)
        finally:
            child.kill()
    log.info("merge_ended", merge_id=merge.id, exit_status=child.returncode)
    with database.write() as session:
        if reason is None:
            merges.give_back(session, merge.id)
            return False
        # Of no effect where the child has ended the row itself.
        merges.fail(session, merge.id, reason)
    return True


def _watch(child: "subprocess.Popen[bytes]", is_stopping: Callable[[], bool]) -> str | None:
    """Return why a merge failed if it did not say so itself, or None if it was broken off."""
    started = time.monotonic()
    while True:
        try:
            status = child.wait(POLL_SECONDS)
            return f"The process that merged ended with exit status {status}; see the worker's log."
        except subprocess.TimeoutExpired:
            if is_stopping():
                return None
            if time.monotonic() - started > SECONDS:
                return f"It took more than {SECONDS:.0f} s."
