"""Threads and the pools of OpenMP workers that come with them."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread, get_native_id
from typing import TypeVar

T = TypeVar("T")

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
