"""Where each row of a packed batch begins and ends, and whose it is."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from worker.kernels.training import Rows

ALIKE = 0.85
"""Rows share a bucket if the shorter has at least this share of the longest's tokens."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``[start, end)`` that belong to one adapter (PEFT's name of it).

    `generator`, on the CPU, gives the seeds of its dropout; torch's own where it is None.
    """

    start: int
    end: int
    adapter: str
    generator: torch.Generator | None = None


class Layout:
    """Rows as half-open spans of ``[0, T)`` without gaps, and the segments of the adapters."""

    def __init__(self, lengths: list[int], segments: tuple[Segment, ...]) -> None:
        self.spans = tuple(pairwise(accumulate(lengths, initial=0)))
        self.segments = segments
        self.casts: dict[Hashable, torch.Tensor] = {}
        """Matrices of adapters in the dtype of the product, for the passes of this layout."""
        self._ends: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def of(cls, lengths: list[int], adapter: str) -> "Layout":
        """Return the layout of rows of these lengths that all belong to one adapter."""
        return cls(lengths, (Segment(0, sum(lengths), adapter),))

    @cached_property
    def longest(self) -> int:
        return max(end - start for start, end in self.spans)

    def ends_on(self, device: torch.device) -> torch.Tensor:
        """Return int32 [rows + 1]: 0 and the end of each row; made once for each device."""
        found = self._ends.get(device)
        if found is None:
            ends = [0, *(end for _, end in self.spans)]
            found = torch.tensor(ends, dtype=torch.int32, device=device)
            self._ends[device] = found
        return found

    @cached_property
    def whole(self) -> Rows:
        """All rows, of whatever lengths."""
        return Rows(self.spans)

    @cached_property
    def buckets(self) -> list[Rows]:
        """The rows in groups of about equal length, in order, the longest of each first."""
        groups: list[list[tuple[int, int]]] = []
        longest = 0
        for span in self.spans:
            length = span[1] - span[0]
            if groups and ALIKE * longest <= length <= longest:
                groups[-1].append(span)
            else:
                groups.append([span])
                longest = length
        return [Rows(spans) for spans in groups]


_current: ContextVar[Layout] = ContextVar("packed_layout")


@contextmanager
def active(layout: Layout) -> Iterator[None]:
    """Make `layout` the one that modules inside see."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Layout:
    """Return the active layout; `LookupError` outside of a packed forward pass."""
    return _current.get()


def is_active() -> bool:
    """Tell whether this is inside a packed forward pass."""
    return _current.get(None) is not None
