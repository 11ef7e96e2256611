"""Rows that occur twice: exactly, or equal but for case, white space and punctuation.

Two numbers of 8 bytes are kept for a row and compared at the end, so that a million rows cost 24 MB
and nothing is compared pair by pair. Two different rows share a number once in 10^7 files of a
million rows, and the price is one wrong warning.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

_LOWER = bytes.maketrans(bytes(range(65, 91)), bytes(range(97, 123)))
_IGNORED = b" \t.,;:!?'\"-_()[]{}*#`"


def likeness(text: bytes) -> int:
    """Return a number that rows share if they differ in case, spaces and punctuation alone.

    It is the same in every process and on every machine, so files can be compared by it.

    Args:
        text: The row as JSON text in UTF-8.
    """
    return xxhash.xxh3_64_intdigest(text.translate(_LOWER, _IGNORED))


@dataclass(frozen=True, slots=True)
class Duplicate:
    """`line` repeats `first_line`; `exact` says whether byte for byte."""

    line: int
    first_line: int
    exact: bool


class DuplicateFinder:
    """Collects rows one by one and tells the repeated ones at the end."""

    def __init__(self) -> None:
        self._lines = array("Q")
        self._exact = array("Q")
        self._alike = array("Q")

    def add(self, line: int, text: bytes) -> int:
        """Remember the row of `line`, given as JSON text; return its `likeness`."""
        self._lines.append(line)
        self._exact.append(xxhash.xxh3_64_intdigest(text))
        number = likeness(text)
        self._alike.append(number)
        return number

    @property
    def likenesses(self) -> "np.ndarray":
        """The numbers of all rows, shape (rows,), dtype uint64."""
        return np.frombuffer(self._alike, dtype=np.uint64)

    def duplicates(self) -> Iterator[Duplicate]:
        """Yield every row that repeats an earlier one, by line."""
        if not self._lines:
            return
        exact = np.frombuffer(self._exact, dtype=np.uint64)
        first = _first_occurrences(self.likenesses)
        repeated = np.flatnonzero(first != np.arange(len(first)))
        for index in repeated.tolist():
            original = int(first[index])
            yield Duplicate(
                line=self._lines[index],
                first_line=self._lines[original],
                exact=bool(exact[index] == exact[original]),
            )


def _first_occurrences(numbers: "np.ndarray") -> "np.ndarray":
    """Return for each element the index of the first one that equals it; shape (n,), int64."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])
