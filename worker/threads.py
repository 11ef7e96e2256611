"""Threads and the pools of OpenMP workers that come with them, and who gives way to whom."""

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread, get_native_id
from typing import TypeVar

import structlog

T = TypeVar("T")
log = structlog.get_logger(__name__)

LEAST_URGENT = 19
"""The niceness of work that takes what processor time others leave."""


def in_passing_thread(work: Callable[[], T], *, niceness: int = 0) -> T:
    """Run `work` in a thread that ends with it; return what it returns, or raise what it raises.

    OpenMP keeps a pool of workers for every living thread that ever ran an operation in parallel.
    Where there are more workers than processors they all wait for work asleep, and waking one takes
    longer than a small product. So what a process does once, such as loading its model, is done
    here, and the thread that makes products all day has the only pool.

    Args:
        work: What to do; not starting a process that is to end with its parent, which would end
            with this thread (PR_SET_PDEATHSIG).
        niceness: How much the thread, and those that it starts, give way to others (Linux keeps
            this by thread; a process could not become urgent again).
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            if niceness:
                os.setpriority(os.PRIO_PROCESS, get_native_id(), niceness)
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 (raised where the result is awaited)
            result.set_exception(error)

    thread = Thread(target=run, name="passing", daemon=True)
    thread.start()
    found = result.result()
    thread.join()
    return found


_AUTOGROUP = Path("/proc/self/autogroup")
_TRIES = 20


def set_session_niceness(niceness: int) -> None:
    """Let all of this process's session give way to other sessions, or no longer (0).

    Where Linux groups processes by session (``sched_autogroup_enabled``) the niceness of a thread
    counts only within its session, and this one between them. Unlike that of a process it can be
    taken back. A process that does not lead its session leaves it as it is.
    """
    if os.getsid(0) != os.getpid() or not _AUTOGROUP.exists():
        return
    for _ in range(_TRIES):
        try:
            _AUTOGROUP.write_text(str(niceness))
        except OSError as error:
            if error.errno != errno.EAGAIN:  # Linux takes ten changes a second, of all processes
                log.warning("session_niceness_not_set", niceness=niceness, error=str(error))
                return
            time.sleep(0.1)
        else:
            return
    log.warning("session_niceness_not_set", niceness=niceness, error="the kernel is busy")
