"""Keys that were checked a moment ago: of many requests with one key, few ask the database."""

import time
from typing import Generic, TypeVar

Caller = TypeVar("Caller")

MAX_KEYS = 10_000


class KeyCache(Generic[Caller]):
    """Whom a secret stands for, for `seconds`; used from the event loop and from threads.

    A key that is revoked by another process is taken for so long after; `forget` ends that at once
    in this one.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._known: dict[str, tuple[Caller, float]] = {}

    def get(self, secret: str) -> Caller | None:
        caller, until = self._known.get(secret, (None, 0.0))
        return caller if until > time.monotonic() else None

    def put(self, secret: str, caller: Caller) -> None:
        if self._seconds and len(self._known) >= MAX_KEYS:
            self._known = {}
        if self._seconds:
            self._known[secret] = (caller, time.monotonic() + self._seconds)

    def forget(self) -> None:
        self._known = {}
