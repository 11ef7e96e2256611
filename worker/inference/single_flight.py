"""Doing the same work once for everybody who asks for it at the same time."""

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

from models.errors import TuneryError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Failure:
    error: TuneryError
    until: float


class SingleFlight(Generic[T]):
    """Runs one call per key at a time; whoever asks meanwhile waits for the same result.

    A `TuneryError` is remembered for `failure_seconds`, so that a broken thing that many ask for
    is not tried again for each of them. Different keys never wait for each other.
    """

    def __init__(self, failure_seconds: float = 5.0) -> None:
        self._failure_seconds = failure_seconds
        self._lock = Lock()
        self._flights: dict[str, Future[T]] = {}
        self._failures: dict[str, _Failure] = {}

    def run(self, key: str, work: Callable[[], T]) -> T:
        """Return the result of `work`, run here or by the caller that came first; blocks."""
        with self._lock:
            self._forget_old_failures()
            if key in self._failures:
                raise copy.copy(self._failures[key].error)
            flight = self._flights.get(key)
            if flight is None:
                mine: Future[T] = Future()
                self._flights[key] = mine
        if flight is not None:
            return flight.result()
        try:
            result = work()
        except BaseException as error:
            with self._lock:
                del self._flights[key]
                if isinstance(error, TuneryError):
                    until = time.monotonic() + self._failure_seconds
                    self._failures[key] = _Failure(error, until)
            mine.set_exception(error)
            raise
        with self._lock:
            del self._flights[key]
        mine.set_result(result)
        return result

    def _forget_old_failures(self) -> None:
        now = time.monotonic()
        for key in [key for key, failure in self._failures.items() if failure.until <= now]:
            del self._failures[key]
