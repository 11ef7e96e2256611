"""Counting what is served: kept in memory for a moment, then added to the day's usage."""

import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

import structlog
from sqlalchemy.exc import SQLAlchemyError

from models.db import Database
from models.domain.generation import Chunk, Finished, GenerateEvent, Started
from models.registry import usage
from models.registry.usage import Used, User

log = structlog.get_logger(__name__)

FLUSH_SECONDS = 1.0


class Meter:
    """Adds up usage and writes it once a second, so that no request waits for it.

    A process that is killed loses what it counted in its last second.

    Args:
        database: Where usage is written.
        spend: Told of every amount once, for the rate limits.
    """

    def __init__(
        self, database: Database, spend: Callable[[Iterable[tuple[User, Used]]], None]
    ) -> None:
        self._database = database
        self._spend = spend
        self._waiting: dict[User, Used] = {}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def count(self, user: User, used: Used) -> None:
        """Count an amount for a user."""
        with self._lock:
            total = self._waiting.setdefault(user, Used())
            total += used
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
                self._thread.start()

    async def watch(
        self, user: User, events: AsyncGenerator[GenerateEvent, None]
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Pass the events of one answer on and count it, also when it is broken off.

        Of an answer that has no end, each piece of text counts as a token: the least it can be.
        """
        used = Used(requests=1)
        n_pieces = 0
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Started):
                        used.prompt_tokens = event.prompt_tokens
                    elif isinstance(event, Chunk):
                        n_pieces += bool(event.text)
                    elif isinstance(event, Finished):
                        used.prompt_tokens = event.prompt_tokens
                        used.completion_tokens = event.completion_tokens
                    yield event
        finally:
            used.completion_tokens = used.completion_tokens or n_pieces
            if used.tokens:
                self.count(user, used)

    def pending(self, project_id: str) -> int:
        """Return the tokens of a project that are not written yet."""
        with self._lock:
            return sum(
                used.tokens for user, used in self._waiting.items() if user.project_id == project_id
            )

    def flush(self) -> None:
        """Write what waits; a database that does not answer leaves it for the next time."""
        with self._flushing:
            with self._lock:
                taken, self._waiting = self._waiting, {}
            if not taken:
                return
            try:
                with self._database.write() as session:
                    usage.add(session, taken.items())
            except SQLAlchemyError as error:
                log.warning("usage_not_written", error=str(error))
                with self._lock:
                    for user, used in taken.items():
                        total = self._waiting.setdefault(user, Used())
                        total += used
                return
        self._spend(taken.items())

    def _run(self) -> None:
        while not self._stopped.wait(FLUSH_SECONDS):
            self.flush()

    def close(self) -> None:
        """Write what waits, and end."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()
