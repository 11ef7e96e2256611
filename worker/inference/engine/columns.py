"""Where the adapters of the slots stand in buffers that they share: a range of columns each.

The ranges are the same in all layers, so that one mask tells every layer which columns are a
row's own, and one plan which rows meet in a range (`Lanes`).
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

GRAIN = 32
"""The number of columns is a multiple of this: growing copies every buffer."""
NARROWEST, MOST_PLACES = 4, 8
"""Lanes below this width, and more of them for one row, are slower than one product of all."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """Stretches of one width, one after the other, and the rows of a pass that go through each.

    A product of a batch then reads every lane once, and no row meets the columns of others. A wide
    range is several lanes, whose results are added.
    """

    n: int
    rows: torch.Tensor
    """The row at each place [n × the most rows of one lane]; row 0 at places that stay empty."""
    places: torch.Tensor
    """Where the results of each row are [rows, the most lanes of one row]."""
    is_taken: torch.Tensor | None
    """Which of `places` are a row's own [rows, …]; None: all are."""
    in_order: bool
    """Whether the first lane is the first row's and nobody else's, the second the second's, …"""

    @property
    def is_even(self) -> bool:
        """Whether empty places cost less than what rows would lose to others' columns."""
        return len(self.rows) <= 2 * self.places.numel()


class Columns:
    """The ranges of `n_slots` slots, and what of them the next pass looks at.

    Args:
        n_slots: How many ranges there are; the index after the last stands for the base model.
        device: Where masks are.
    """

    def __init__(self, n_slots: int, device: torch.device) -> None:
        self.size = 0
        """Columns that the buffers have to have."""
        self.span = slice(0, 0)
        """From the first to the last column of any adapter in the next pass."""
        self._ranges = [range(0)] * (n_slots + 1)
        self._device = device
        self._rows: list[int] = []
        self._mask: torch.Tensor | None = None
        self._lanes: Lanes | None = None
        self._undivided: list[range] | None = None

    def of(self, slot: int) -> range:
        return self._ranges[slot]

    def place(self, slot: int, width: int) -> None:
        """Give a slot the first gap of `width` columns; `size` grows where there is none.

        It starts at a multiple of the largest power of two in `width`, so that ranges of usual
        ranks keep in step.
        """
        self._ranges[slot] = range(0)
        start, step = 0, max(1, width & -width)
        for taken in sorted((each for each in self._ranges if each), key=lambda each: each.start):
            if taken.start - start >= width:
                break
            start = max(start, -(-taken.stop // step) * step)
        if start + width > self.size:
            self.size = max(2 * self.size, -(-(start + width) // GRAIN) * GRAIN)
        self._ranges[slot] = range(start, start + width)

    def use(self, rows: Sequence[int], active: Set[int]) -> None:
        """Set the slot of every row of the next pass; `active` are those of adapters."""
        self._rows, self._mask = list(rows), None
        ranges = [each for slot in active if (each := self._ranges[slot])]
        self.span = slice(
            min((each.start for each in ranges), default=0),
            max((each.stop for each in ranges), default=0),
        )
        self._undivided = ranges

    @property
    def lanes(self) -> Lanes | None:
        """How the rows go through the span; None where it is one range, or lanes do not pay."""
        if self._undivided is not None:
            self._lanes, self._undivided = self._divide(self._undivided), None
        return self._lanes

    def _divide(self, ranges: Sequence[range]) -> Lanes | None:
        first = self.span.start
        width = math.gcd(*map(len, ranges), *(each.start - first for each in ranges))
        if len(ranges) < 2 or width < NARROWEST:
            return None
        members: list[list[int]] = [[] for _ in range((self.span.stop - first) // width)]
        lanes_of = [
            range((each.start - first) // width, (each.stop - first) // width)
            for each in (self._ranges[slot] for slot in self._rows)
        ]
        most_lanes = max(map(len, lanes_of))
        if most_lanes > MOST_PLACES:
            return None
        for row, lanes in enumerate(lanes_of):
            for lane in lanes:
                members[lane].append(row)
        most = max(map(len, members))
        places = [
            [lane * most + members[lane].index(row) for lane in lanes]
            + [0] * (most_lanes - len(lanes))
            for row, lanes in enumerate(lanes_of)
        ]
        is_taken = [[number < len(lanes) for number in range(most_lanes)] for lanes in lanes_of]
        at_places = [row for rows in members for row in rows + [0] * (most - len(rows))]
        return Lanes(
            n=len(members),
            rows=torch.tensor(at_places, device=self._device),
            places=torch.tensor(places, device=self._device),
            is_taken=(
                None if all(map(all, is_taken)) else torch.tensor(is_taken, device=self._device)
            ),
            in_order=members == [[row] for row in range(len(self._rows))],
        )

    def use_all(self, own: torch.Tensor) -> None:
        """Let the next pass look at all columns, each row's own being `own` [rows, 2].

        Nothing but the numbers in `own`, where a row's columns begin and end, then differs from one
        pass to the next.
        """
        self.span = slice(0, self.size)
        self._lanes = self._undivided = None
        self._mask = self._is_own(own)

    def bounds(self) -> list[list[int]]:
        """Return where the columns of every row of the next pass begin and end."""
        return [[self._ranges[slot].start, self._ranges[slot].stop] for slot in self._rows]

    @property
    def mask(self) -> torch.Tensor | None:
        """Whether a column is of the row's own adapter, [rows, columns]; None: they all are."""
        if self._mask is None:
            if len(set(self._rows)) == 1 and self._ranges[self._rows[0]]:
                return None
            self._mask = self._is_own(torch.tensor(self.bounds(), device=self._device))
        return self._mask

    def _is_own(self, own: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(self.span.start, self.span.stop, device=self._device)
        return (columns >= own[:, :1]) & (columns < own[:, 1:])
