"""Short writes of many requests in one transaction, so that they share the time of its commit.

SQLite writes each commit to the disk before the next one may begin, and each takes a millisecond
or more; what eight clients write at the same time may as well be committed at once, as the servers
of other databases do by themselves.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from models.db import Database, Outcome

_Result = TypeVar("_Result")

MOST = 64
"""Writes of one transaction, so that no other process waits long for SQLite's lock."""
THREADS = 40
"""Of a database behind a network, as many as starlette has for routes."""


@dataclass(frozen=True, slots=True)
class _Write:
    run: Callable[[Session], Any]
    done: "asyncio.Future[Any]"


class GroupCommit:
    """Carries out writes for one event loop.

    On a file of this machine all that wait are carried out one after the other, each within a
    savepoint of its own, by one thread and in one transaction; on other databases each has a
    thread and a transaction.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[_Write] = deque()
        self._is_busy = False
        threads = 1 if database.is_embedded else THREADS
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="writer")

    async def run(self, write: Callable[[Session], _Result]) -> _Result:
        """Return what `write` returns, once it is committed.

        What it raises is raised here, and nothing of it is kept; the others of its transaction do
        not notice. It must be short and may be carried out although nobody waits any more.

        Raises:
            DBAPIError: the commit failed, of all of them.
        """
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()

        def within(session: Session) -> _Result:
            return context.run(write, session)

        if not self._database.is_embedded:
            return await loop.run_in_executor(self._threads, self._alone, within)
        done: asyncio.Future[_Result] = loop.create_future()
        self._waiting.append(_Write(within, done))
        if not self._is_busy:
            self._is_busy = True
            self._start(loop)
        return await done

    def close(self) -> None:
        """End the threads once what they do is done."""
        self._threads.shutdown()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        group = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
        self._threads.submit(self._together, group, loop)

    def _alone(self, write: Callable[[Session], _Result]) -> _Result:
        with self._database.write() as session:
            return write(session)

    def _together(self, group: list[_Write], loop: asyncio.AbstractEventLoop) -> None:
        together = Outcome.of(
            partial(self._database.write_together, [write.run for write in group])
        )
        outcomes = together.result
        if outcomes is None:  # of none of them is anything kept
            outcomes = [Outcome(error=together.error)] * len(group)
        loop.call_soon_threadsafe(self._settle, group, outcomes, loop)

    def _settle(
        self, group: list[_Write], outcomes: list[Outcome[Any]], loop: asyncio.AbstractEventLoop
    ) -> None:
        for write, outcome in zip(group, outcomes, strict=True):
            if write.done.done():  # nobody waits any more; it is committed all the same
                continue
            if outcome.error is None:
                write.done.set_result(outcome.result)
            else:
                write.done.set_exception(outcome.error)
        if self._waiting:
            self._start(loop)
        else:
            self._is_busy = False
