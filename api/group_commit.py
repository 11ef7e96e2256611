"""Short writes of many requests in one transaction, so that they share the time of its commit.

SQLite writes each commit to the disk before the next one may begin, and each takes a millisecond
or more; what eight clients write at the same time may as well be committed at once, as the servers
of other databases do by themselves.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from models.db import Database, Outcome

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

MOST = 64
"""Writes of one transaction, so that no other process waits long for SQLite's lock."""
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.003, 0.02
"""After the last write and after the first, for those of clients that were just answered."""
THREADS = 40
"""Of a database behind a network, as many as starlette has for routes."""


Together = Callable[[Session, Sequence[Any]], Sequence[Outcome[Any]]]
"""Carries out many writes of one kind; of one whose outcome is an error it has written nothing."""


@dataclass(frozen=True, slots=True)
class _Write:
    kind: Together
    item: Any
    done: "asyncio.Future[Any]"

    def alone(self, session: Session) -> list[Any]:
        return _results(self.kind(session, [self.item]))


def _each(session: Session, writes: Sequence[Callable[[Session], Any]]) -> list[Outcome[Any]]:
    return [Outcome(write(session)) for write in writes]


def _parts(group: list[_Write]) -> list[list[_Write]]:
    """Return the writes in their order, those of a kind that follow each other together."""
    parts: list[list[_Write]] = []
    for write in group:
        if parts and write.kind is not _each and write.kind == parts[-1][0].kind:
            parts[-1].append(write)
        else:
            parts.append([write])
    return parts


def _call(part: list[_Write]) -> Callable[[Session], Sequence[Outcome[Any]]]:
    return lambda session: part[0].kind(session, [write.item for write in part])


def _results(outcomes: Sequence[Outcome[Any]]) -> list[Any]:
    """Return the results; raises the first error, so that nothing of its transaction is kept."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.result for outcome in outcomes]


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
        self._pause: asyncio.TimerHandle | None = None
        self._until = 0.0
        self._expected = 0
        threads = 1 if database.is_embedded else THREADS
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="writer")

    async def run(self, write: Callable[[Session], _Result]) -> _Result:
        """Return what `write` returns, once it is committed.

        What it raises is raised here, and nothing of it is kept; the others of its transaction do
        not notice. It must be short and may be carried out although nobody waits any more.

        Raises:
            DBAPIError: the commit failed, of all of them.
        """
        context = contextvars.copy_context()

        def within(session: Session) -> _Result:
            return context.run(write, session)

        result: _Result = await self._put(_each, within)
        return result

    async def join(
        self,
        together: Callable[[Session, Sequence[_Item]], Sequence[Outcome[_Result]]],
        item: _Item,
    ) -> _Result:
        """Return what `together` makes of an item, once it is committed.

        All items that wait for the same function are carried out by one call of it, which refuses
        one of them before it has written anything of it. Where the call itself fails, each is
        tried once more alone. It does not see the context of the request.

        Raises:
            DBAPIError: as `run`.
        """
        result: _Result = await self._put(together, item)
        return result

    async def _put(self, kind: Together, item: Any) -> Any:
        loop = asyncio.get_running_loop()
        write = _Write(kind, item, loop.create_future())
        if not self._database.is_embedded:
            return (await loop.run_in_executor(self._threads, self._alone, write))[0]
        self._waiting.append(write)
        self._arrange(loop)
        return await write.done

    def close(self) -> None:
        """End the threads once what they do is done."""
        self._threads.shutdown()

    def _arrange(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin soon, and at once when as many wait as clients were just answered or wait since.

        Clients that write one job after the other so stay together, as with PostgreSQL's
        ``commit_delay``: each transaction costs as much as several of its writes.
        """
        if self._is_busy or not self._waiting:
            return
        now = loop.time()
        if self._pause is None:
            self._until = now + MAX_PAUSE_SECONDS
        else:
            self._pause.cancel()
        if len(self._waiting) < self._expected:
            self._pause = loop.call_at(min(now + PAUSE_SECONDS, self._until), self._start, loop)
        else:
            self._is_busy = True
            loop.call_soon(self._start, loop)  # what else this turn of the loop writes comes along

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pause = None
        self._is_busy = True
        group = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
        self._threads.submit(self._together, group, loop)

    def _alone(self, write: _Write) -> list[Any]:
        with self._database.write() as session:
            return write.alone(session)

    def _together(self, group: list[_Write], loop: asyncio.AbstractEventLoop) -> None:
        parts = _parts(group)
        together = Outcome.of(
            partial(self._database.write_together, [_call(part) for part in parts])
        )
        outcomes: list[Outcome[Any]] = [Outcome(error=together.error)] * len(group)
        if together.result is not None:  # else nothing is kept of any of them
            outcomes = self._outcomes(parts, together.result)
        loop.call_soon_threadsafe(self._settle, group, outcomes, loop)

    def _outcomes(self, parts: list[list[_Write]], found: list[Outcome[Any]]) -> list[Outcome[Any]]:
        """Return the outcome of each write; if a part failed, its writes are tried alone."""
        outcomes: list[Outcome[Any]] = []
        for part, done in zip(parts, found, strict=True):
            if done.error is None:
                outcomes += done.result or []
            elif len(part) == 1:
                outcomes.append(Outcome(error=done.error))
            else:  # what one of them met may not concern the others
                again = self._alone_again(part)
                outcomes += [Outcome(each.result and each.result[0], each.error) for each in again]
        return outcomes

    def _alone_again(self, part: list[_Write]) -> list[Outcome[Any]]:
        calls = [write.alone for write in part]
        again = Outcome.of(partial(self._database.write_together, calls))
        return [Outcome(error=again.error)] * len(part) if again.result is None else again.result

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
        self._is_busy = False
        self._expected = min(MOST, len(self._waiting) + len(group))
        self._arrange(loop)
