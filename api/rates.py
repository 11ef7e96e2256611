"""Rate limits of keys, counted in Valkey for all API processes together.

Requests are counted in a sliding window, tokens in minutes: what an answer takes is known only
afterwards, so it may exceed the minute and then the next request waits. A broker that does not
answer limits nobody: the limits protect the service, and the service does not rest on the broker.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import RedisStorage
from limits.strategies import (
    FixedWindowRateLimiter,
    RateLimiter,
    SlidingWindowCounterRateLimiter,
)

from models.errors import CapacityError
from models.registry.usage import Used, User
from models.settings import BrokerSettings

log = structlog.get_logger(__name__)

TIMEOUT_SECONDS = 0.5
PAUSE_SECONDS = 5.0
"""A broker that did not answer is left alone for so long."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Response headers that tell a key's limits, and the refusal if it has used them up."""

    headers: dict[str, str]
    refusal: CapacityError | None = None


_NO_LIMIT = Verdict({})


class RateLimits:
    """Counts for each key; all methods block and never raise for the broker's sake."""

    def __init__(self, settings: BrokerSettings) -> None:
        url = settings.url.get_secret_value().replace("redis+socket://", "redis+unix://", 1)
        storage = RedisStorage(
            url,
            key_prefix=f"{settings.key_prefix}rates",
            wrap_exceptions=True,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
        )
        self._requests = SlidingWindowCounterRateLimiter(storage)
        self._tokens = FixedWindowRateLimiter(storage)
        self._token_limits: dict[str, int] = {}
        self._silent_until = float("-inf")

    def admit(self, key_id: str, per_minute: int | None) -> Verdict:
        """Count one request of a key."""
        if per_minute is None or self._is_silent():
            return _NO_LIMIT
        item = RateLimitItemPerMinute(per_minute)
        try:
            admitted = self._requests.hit(item, "requests", key_id)
            return _verdict(self._requests, item, "requests", key_id, admitted)
        except StorageError as error:
            return self._unanswered(error)

    def admit_tokens(self, key_id: str, per_minute: int | None) -> Verdict:
        """Say whether a key may be served tokens; `spend` counts them."""
        if per_minute is None:
            self._token_limits.pop(key_id, None)
            return _NO_LIMIT
        self._token_limits[key_id] = per_minute
        if self._is_silent():
            return _NO_LIMIT
        item = RateLimitItemPerMinute(per_minute)
        try:
            admitted = self._tokens.test(item, "tokens", key_id)
            return _verdict(self._tokens, item, "tokens", key_id, admitted)
        except StorageError as error:
            return self._unanswered(error)

    def spend(self, amounts: Iterable[tuple[User, Used]]) -> None:
        """Count the tokens that keys with a limit were served."""
        if self._is_silent():
            return
        try:
            for user, used in amounts:
                limit = self._token_limits.get(user.key_id or "")
                if limit is not None and used.tokens:
                    item = RateLimitItemPerMinute(limit)
                    self._tokens.hit(item, "tokens", user.key_id or "", cost=used.tokens)
        except StorageError as error:
            self._unanswered(error)

    def _is_silent(self) -> bool:
        return time.monotonic() < self._silent_until

    def _unanswered(self, error: StorageError) -> Verdict:
        self._silent_until = time.monotonic() + PAUSE_SECONDS
        log.warning("rates_not_limited", error=str(error.storage_error))
        return _NO_LIMIT


def _verdict(
    limiter: RateLimiter, item: RateLimitItem, what: str, key_id: str, admitted: bool
) -> Verdict:
    stats = limiter.get_window_stats(item, what, key_id)
    seconds = min(60.0, max(0.0, stats.reset_time - time.time()))
    headers = {
        f"x-ratelimit-limit-{what}": str(item.amount),
        f"x-ratelimit-remaining-{what}": str(stats.remaining),
        f"x-ratelimit-reset-{what}": f"{seconds:.3f}s",
    }
    if admitted:
        return Verdict(headers)
    refusal = CapacityError(
        f"This key may use {item.amount:,} {what} a minute and has done so. Try again in "
        f"{math.ceil(seconds)} s, or have its limit raised.",
        retry_after=max(1, math.ceil(seconds)),
    )
    return Verdict(headers, refusal)
