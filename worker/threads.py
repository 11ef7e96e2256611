"""Threads and the pools of OpenMP workers that come with them."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_passing_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with it; return what it returns, or raise what it raises.

    OpenMP keeps a pool of workers for every living thread that ever ran an operation in parallel.
    Where there are more workers than processors they all wait for work asleep, and waking one takes
    longer than a small product. So what a process does once, such as loading its model, is done
    here, and the thread that makes products all day has the only pool.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 (raised where the result is awaited)
            result.set_exception(error)

    thread = Thread(target=run, name="passing", daemon=True)
    thread.start()
    found = result.result()
    thread.join()
    return found
