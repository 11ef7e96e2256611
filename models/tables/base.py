"""The declarative base: names of constraints, identifiers, times."""

import os
import threading
import time
from functools import lru_cache
from typing import Any

from sqlalchemy import JSON, Double, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models.db import db_now
from models.domain.base import JsonObject

_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # no 0/o, 1/l: ids are read aloud

_ORDERED = "".join(sorted(_ALPHABET))

_JSON = JSON(none_as_null=True)  # else None is stored as JSON's null, which IS NULL never finds


_CHARACTERS = bytes(ord(_ALPHABET[byte % 32]) for byte in range(256))
_RANDOM_BYTES = 4096


class _Randomness:
    """Bytes of the system's generator, fetched many at a time and each given out once.

    Asking for each identifier would hand Python's lock to another thread each time. A child
    process has its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = b""
        self._next = 0

    def take(self, n: int) -> bytes:
        with self._lock:
            start = self._next
            if start + n > len(self._bytes):
                self._bytes, start = os.urandom(max(n, _RANDOM_BYTES)), 0
            self._next = start + n
            return self._bytes[start : start + n]


_randomness = _Randomness()
os.register_at_fork(after_in_child=_randomness.__init__)  # type: ignore[misc]


def new_id(prefix: str, length: int = 24) -> str:
    """Return an unguessable identifier such as ``ftjob-…`` (5 bits a character)."""
    return prefix + _randomness.take(length).translate(_CHARACTERS).decode("ascii")


def ordered_id(prefix: str) -> str:
    """Return an identifier that sorts by the millisecond it was made in; 75 random bits follow.

    For rows that come by the thousand: each goes to the end of its index, where random ones would
    touch, and a commit write, a page for each (as UUID version 7, RFC 9562 section 5.7).
    """
    return new_id(prefix + _time_digits(time.time_ns() // 1_000_000), 15)


@lru_cache(1)  # those of one transaction often share a millisecond
def _time_digits(milliseconds: int) -> str:
    return "".join([_ORDERED[milliseconds >> shift & 31] for shift in range(40, -1, -5)])


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        JsonObject: _JSON,
        list[str]: _JSON,
        list[dict[str, Any]]: _JSON,
        float: Double,
        dict[str, Any]: _JSON,
    }


class Created:
    """When a row came to be, in seconds since 1970 by the database's clock."""

    created_at: Mapped[float] = mapped_column(default=db_now(), index=True)


class Listed:
    """Like `Created`, for long tables that are listed by project: their own index has the time.

    One on the time alone would tempt PostgreSQL to read other projects' rows along it.
    """

    created_at: Mapped[float] = mapped_column(default=db_now())
