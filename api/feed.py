"""News of running jobs for many readers: one query for all of them, however many there are.

A reader holds no thread and no database connection. One task of the process asks many times a
second, with one query, which of the jobs that somebody reads have changed; only of those it reads
what is new, renders it once, and hands the same bytes to all their readers.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import orjson
import structlog
from fastapi.concurrency import run_in_threadpool

from api import bodies
from models.db import Database
from models.domain.base import JsonObject
from models.registry import checkpoints, events, jobs, metrics, turns
from models.tables import Job

log = structlog.get_logger(__name__)
_Result = TypeVar("_Result")

POLL_SECONDS = 0.02
GLANCE_SECONDS = 0.005
"""Between two looks at the version of a file of this machine, which take some microseconds."""
MAX_SHARE = 0.1
"""Share of the time that asking may take; above it, it is done less often."""
KEEP_ALIVE_SECONDS = 15.0
"""Proxies close a stream that is silent for longer (nginx after 60 s)."""
MAX_WAITING = 100
"""A reader who is so many news behind is cut off; it comes back and asks for what it has missed."""
HISTORY = 10_000


@dataclass(frozen=True, slots=True)
class Position:
    """What a reader has seen: the newest step, event and checkpoint."""

    step: int = 0
    sequence: int = 0
    checkpoint_step: int = 0

    def __str__(self) -> str:
        return f"{self.step}-{self.sequence}-{self.checkpoint_step}"

    def is_within(self, other: "Position") -> bool:
        """Whether whoever is at `other` has seen everything that was seen here."""
        return (
            self.step <= other.step
            and self.sequence <= other.sequence
            and self.checkpoint_step <= other.checkpoint_step
        )

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Read what `str` wrote; a plain number is a step. Raises ``ValueError``."""
        numbers = [int(part) for part in text.split("-")]
        return cls(*numbers[:3])


@dataclass(frozen=True)
class News:
    """What has come after a position, and the position after it."""

    position: Position
    job: JsonObject | None = None
    metrics: list[JsonObject] = field(default_factory=list)
    events: list[JsonObject] = field(default_factory=list)
    checkpoints: list[JsonObject] = field(default_factory=list)
    has_ended: bool = False

    def after(self, position: Position) -> "News":
        """Return what of this news a reader who is at a position has not seen."""
        return replace(
            self,
            metrics=[each for each in self.metrics if each["step"] > position.step],
            events=[each for each in self.events if each["sequence"] > position.sequence],
            checkpoints=[
                each for each in self.checkpoints if each["step_number"] > position.checkpoint_step
            ],
        )

    @property
    def is_empty(self) -> bool:
        return not (self.job or self.metrics or self.events or self.checkpoints)

    @cached_property
    def sse(self) -> bytes:
        """The server-sent events of this news; the last one carries the position."""
        found: list[tuple[str, object]] = []
        if self.metrics:
            found.append(("metrics", self.metrics))
        found += [("event", each) for each in self.events]
        found += [("checkpoint", each) for each in self.checkpoints]
        if self.job is not None:
            found.append(("job", self.job))
        if self.has_ended and self.job is not None:
            found.append(("end", {"status": self.job["status"]}))
        if not found:
            return b": still here\n\n"
        parts = [f"event: {name}\ndata: ".encode() + orjson.dumps(data) for name, data in found]
        parts[-1] = f"id: {self.position}\n".encode() + parts[-1]
        return b"".join(part + b"\n\n" for part in parts)


@dataclass(slots=True)
class _Watched:
    position: Position
    job: JsonObject
    mark: tuple[str, int] | None = None
    readers: set["_Reader"] = field(default_factory=set)


class _Reader:
    """The news that wait for one stream: a queue without locks, since it has one thread."""

    def __init__(self) -> None:
        self._news: deque[News | None] = deque()
        self._wanted: asyncio.Future[None] | None = None

    def tell(self, news: News) -> None:
        """Add news; who has too many already is told that it ends."""
        if len(self._news) < MAX_WAITING:
            self._news.append(news if len(self._news) < MAX_WAITING - 1 else None)
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def next(self) -> News | None:
        while not self._news:
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        return self._news.popleft()


class JobFeed:
    """All readers of this process.

    Args:
        database: Where the jobs are.
        organization: Part of the job objects.
    """

    def __init__(self, database: Database, organization: str) -> None:
        self._database = database
        self._organization = organization
        self._watched: dict[str, _Watched] = {}
        self._task: asyncio.Task[None] | None = None
        self._version: int | None = None

    async def read(self, job_id: str, after: Position) -> AsyncGenerator[News | None, None]:
        """Yield what has come after a position, then what comes, until the job has ended.

        Nothing is left out or told twice. None is yielded when the reader was too slow.
        """
        reader = _Reader()
        watched = self._watched.get(job_id)
        if watched is None:
            # The position is taken first: what comes later reaches the reader.
            start = await self._ask(self._look, job_id, after, "")
            watched = self._watched.setdefault(job_id, _Watched(start.position, start.job or {}))
        watched.readers.add(reader)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll())
        try:
            # Everything up to the common position, which the reader goes on from.
            until = watched.position
            is_ahead = not after.is_within(until)
            history = await run_in_threadpool(self._look, job_id, after, "", until)
            yield history
            if history.has_ended:
                # What it wrote after the common position; nothing follows the end.
                yield await run_in_threadpool(self._look, job_id, history.position, "")
                return
            while True:
                news = await reader.next()
                if is_ahead and news is not None:
                    is_ahead = not after.is_within(news.position)
                    news = news.after(after)
                yield news
                if news is None or news.has_ended:
                    return
        finally:
            watched.readers.discard(reader)
            if not watched.readers:
                self._watched.pop(job_id, None)

    @property
    def n_readers(self) -> int:
        """How many streams are open at this process."""
        return sum(len(watched.readers) for watched in self._watched.values())

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _poll(self) -> None:
        usual = GLANCE_SECONDS if self._database.is_embedded else POLL_SECONDS
        pause = usual
        told_at = time.monotonic()
        while self._watched:
            await asyncio.sleep(pause)
            asked = 0.0
            try:
                asked = await self._tell_news()
            except Exception:
                log.exception("feed_failed")
            now = time.monotonic()
            pause = max(usual, asked / MAX_SHARE)
            if now - told_at > KEEP_ALIVE_SECONDS:
                told_at = now
                for watched in self._watched.values():
                    _hand_over(watched, News(watched.position))

    async def _tell_news(self) -> float:
        """Hand over what is new; return how many seconds it took to ask which jobs have changed."""
        version = self._database.version()
        job_ids = {job_id for job_id, watched in self._watched.items() if watched.mark is None}
        if version is None or version != self._version:
            job_ids = set(self._watched)
        if not job_ids:
            return 0.0
        started = time.monotonic()
        marks = await self._ask(self._marks, list(job_ids))
        seconds = time.monotonic() - started
        for job_id, mark in marks.items():
            watched = self._watched.get(job_id)
            if watched is None or watched.mark == mark:
                continue
            seen = str(watched.job.get("status"))
            news = await self._ask(self._look, job_id, watched.position, seen)
            watched.mark = mark
            if not news.is_empty:
                watched.position = news.position
                watched.job = news.job or watched.job
                _hand_over(watched, news)
        self._version = version
        return seconds

    async def _ask(self, read: Callable[..., _Result], *arguments: object) -> _Result:
        """Run a few indexed reads as `api.deps.short_read` does."""
        if self._database.is_embedded:
            return read(*arguments)
        return await run_in_threadpool(read, *arguments)

    def _marks(self, job_ids: list[str]) -> dict[str, tuple[str, int]]:
        with self._database.read() as session:
            return events.marks(session, job_ids)

    def _look(
        self, job_id: str, after: Position, status: str, until: Position | None = None
    ) -> News:
        """Return what came after a position (and until another)."""
        with self._database.read() as session:
            job = session.get_one(Job, job_id)
            points = metrics.after(session, job_id, after.step, HISTORY)
            told = events.after(session, job_id, after.sequence, HISTORY)
            saved = checkpoints.after(session, job_id, after.checkpoint_step)
            if until is not None:
                points = [each for each in points if each.step <= until.step]
                told = [each for each in told if each.sequence <= until.sequence]
                saved = [each for each in saved if each.step <= until.checkpoint_step]
            place = turns.places(session, [job]).get(job_id)
            body = bodies.job_body(job, self._organization, place)
            is_news = status != job.status or bool(points)
            return News(
                position=Position(
                    max([after.step, *(each.step for each in points)]),
                    max([after.sequence, *(each.sequence for each in told)]),
                    max([after.checkpoint_step, *(each.step for each in saved)]),
                ),
                job=body if is_news else None,
                metrics=[each.model_dump(exclude_none=True) for each in points],
                events=[bodies.event_body(each) for each in told if each.data is None],
                checkpoints=[bodies.checkpoint_body(each) for each in saved],
                has_ended=jobs.has_ended(job),
            )


def _hand_over(watched: _Watched, news: News) -> None:
    for reader in watched.readers:
        reader.tell(news)
