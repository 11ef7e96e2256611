"""Where each row of a packed batch begins and ends, and whose it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

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


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring rows of about one length, side by side in [rows, n].

    Tokens ``[start, end)`` of the batch. `gather` are the S·n indices of tokens, a row's last token
    repeated where it is shorter than `n`; `real` are the places among them that hold a token of
    their own, in order, and `spare` the others.
    """

    start: int
    end: int
    n_rows: int
    n: int
    gather: torch.Tensor
    real: torch.Tensor
    spare: torch.Tensor


class Layout:
    """Rows as half-open spans of ``[0, T)`` without gaps, and the segments of the adapters."""

    def __init__(self, lengths: list[int], segments: tuple[Segment, ...]) -> None:
        self.spans = tuple(pairwise(accumulate(lengths, initial=0)))
        self.segments = segments
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
    def buckets(self) -> list[Bucket]:
        """The rows in groups of about equal length, in order; indices are on the CPU."""
        groups: list[list[tuple[int, int]]] = []
        longest = 0
        for span in self.spans:
            length = span[1] - span[0]
            if groups and ALIKE * longest <= length <= longest:
                groups[-1].append(span)
            else:
                groups.append([span])
                longest = length
        return [_bucket(spans) for spans in groups]


def _bucket(spans: list[tuple[int, int]]) -> Bucket:
    n = spans[0][1] - spans[0][0]
    starts = torch.tensor([start for start, _ in spans])[:, None]
    ends = torch.tensor([end for _, end in spans])[:, None]
    places = starts + torch.arange(n)
    is_real = (places < ends).flatten()
    return Bucket(
        spans[0][0],
        spans[-1][1],
        len(spans),
        n,
        torch.minimum(places, ends - 1).flatten(),
        is_real.nonzero()[:, 0],
        (~is_real).nonzero()[:, 0],
    )


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
