"""News of running jobs for many readers: one query for all of them, however many there are.

A reader holds no thread and no database connection. One task of the process asks many times a
second, with one query, which of the jobs that somebody reads have changed; only of those it reads
what is new, renders it once, and sends the same bytes to all their readers itself. The task of a
reader wakes up only when sending has to wait.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import orjson
import structlog
from fastapi.concurrency import run_in_threadpool

from api import bodies
from api.eager import begin
from models.db import Database
from models.domain.base import JsonObject
from models.registry import checkpoints, events, jobs, metrics, turns
from models.tables import Job

log = structlog.get_logger(__name__)
_Result = TypeVar("_Result")

POLL_SECONDS = 0.02
GLANCE_SECONDS = 0.003
"""Between two looks at the version of a file of this machine, which take some microseconds."""
MAX_SHARE = 0.1
"""Share of the time that asking may take; above it, it is done less often."""
KEEP_ALIVE_SECONDS = 15.0
"""Proxies close a stream that is silent for longer (nginx after 60 s)."""
MAX_WAITING = 100
"""A reader who is so many news behind is cut off; it comes back and asks for what it has missed."""
AT_ONCE = 100
"""Readers that are sent something before the event loop does anything else."""
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
    def message(self) -> JsonObject:
        """The piece of an answer's body that `sse` is, in ASGI's form; shared by all readers."""
        return {"type": "http.response.body", "body": self.sse, "more_body": True}

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


Send = Callable[[News], Coroutine[Any, Any, None]]
"""Sends news to one reader; returns when that reader may be sent more."""


class _Reader:
    """One stream. What it is told is sent at once, or waits while sending does."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._seen: Position | None = None
        self._news: deque[News | None] = deque()
        self._idle: asyncio.Future[Awaitable[None] | None] | None = None

    def pass_over(self, seen: Position) -> None:
        """From now on leave out what was seen at a position."""
        self._seen = seen

    def tell(self, news: News) -> None:
        """Send news, or keep them; who has too many already is told that it ends."""
        if self._seen is not None:
            seen = self._seen
            self._seen = None if seen.is_within(news.position) else seen
            news = news.after(seen)
        idle = self._idle
        if idle is None or idle.done():
            if len(self._news) < MAX_WAITING:
                self._news.append(news if len(self._news) < MAX_WAITING - 1 else None)
            return
        if news.has_ended:
            self._news.append(news)
            idle.set_result(None)
            return
        try:
            rest = begin(self._send(news))
        except Exception as error:  # noqa: BLE001 (the reader's task raises it)
            idle.set_exception(error)
            return
        if rest is not None:
            idle.set_result(rest)

    async def follow(self) -> None:
        """Send what waits, and let `tell` send what comes, until the end; or stop: too slow.

        Raises:
            Exception: what sending raises.
        """
        while True:
            while self._news:
                news = self._news.popleft()
                if news is None:
                    return
                await self._send(news)
                if news.has_ended:
                    return
            self._idle = asyncio.get_running_loop().create_future()
            try:
                rest = await self._idle
            finally:
                self._idle = None
            if rest is not None:
                await rest


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

    async def follow(self, job_id: str, after: Position, send: Send) -> None:
        """Send what has come after a position, then what comes, until the job has ended.

        Nothing is left out or told twice. Returns earlier when the reader is too slow.
        """
        reader = _Reader(send)
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
            if not after.is_within(until):
                reader.pass_over(after)
            history = await run_in_threadpool(self._look, job_id, after, "", until)
            await send(history)
            if history.has_ended:
                # What it wrote after the common position; nothing follows the end.
                await send(await run_in_threadpool(self._look, job_id, history.position, ""))
                return
            await reader.follow()
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
                for watched in list(self._watched.values()):
                    await _hand_over(watched, News(watched.position))

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
                await _hand_over(watched, news)
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


async def _hand_over(watched: _Watched, news: News) -> None:
    """Tell all readers; those who come meanwhile begin after this news."""
    readers = list(watched.readers)
    for start in range(0, len(readers), AT_ONCE):
        for reader in readers[start : start + AT_ONCE]:
            reader.tell(news)
        await asyncio.sleep(0)
