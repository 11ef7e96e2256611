"""Where the adapters of the slots stand in buffers that they share: a range of columns each.

The ranges are the same in all layers, so that one mask tells every layer which columns are a
row's own, and one plan which rows meet in a range (`Lanes`).
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

GRAIN = 32
"""The number of columns is a multiple of this: growing copies every buffer."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """Ranges of one width, one after the other, and the rows of a pass that go through each.

    A product of a batch then reads every range once, and no row meets the columns of others.
    """

    n: int
    rows: torch.Tensor
    """The row at each place [n × the most rows of one range]; row 0 at places that stay empty."""
    places: torch.Tensor
    """Where each row's result is [rows]; anywhere for a row without a range."""
    has_place: torch.Tensor | None
    """Whether a row has a range [rows]; None: they all have."""

    @property
    def is_even(self) -> bool:
        """Whether empty places cost less than what rows would lose to others' columns."""
        return len(self.rows) <= 2 * len(self.places)


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
        self.lanes: Lanes | None = None
        """How the rows go through the span; None where it is one range, or not of equal ones."""
        self._ranges = [range(0)] * (n_slots + 1)
        self._device = device
        self._rows: list[int] = []
        self._mask: torch.Tensor | None = None

    def of(self, slot: int) -> range:
        return self._ranges[slot]

    def place(self, slot: int, width: int) -> None:
        """Give a slot the first gap of `width` columns; `size` grows where there is none."""
        self._ranges[slot] = range(0)
        start = 0
        for taken in sorted((each for each in self._ranges if each), key=lambda each: each.start):
            if taken.start - start >= width:
                break
            start = max(start, taken.stop)
        if start + width > self.size:
            self.size = -(-(start + width) // GRAIN) * GRAIN
        self._ranges[slot] = range(start, start + width)

    def use(self, rows: Sequence[int], active: Set[int]) -> None:
        """Set the slot of every row of the next pass; `active` are those of adapters."""
        self._rows, self._mask = list(rows), None
        ranges = [each for slot in active if (each := self._ranges[slot])]
        self.span = slice(
            min((each.start for each in ranges), default=0),
            max((each.stop for each in ranges), default=0),
        )
        self.lanes = self._divide(ranges)

    def _divide(self, ranges: Sequence[range]) -> Lanes | None:
        widths, first = {len(each) for each in ranges}, self.span.start
        if len(ranges) < 2 or len(widths) > 1:
            return None
        [width] = widths
        if any((each.start - first) % width for each in ranges):
            return None
        n = (self.span.stop - first) // width
        members: list[list[int]] = [[] for _ in range(n)]
        for row, slot in enumerate(self._rows):
            if self._ranges[slot]:
                members[(self._ranges[slot].start - first) // width].append(row)
        most = max(len(rows) for rows in members)
        places = [0] * len(self._rows)
        for lane, rows in enumerate(members):
            for place, row in enumerate(rows, start=lane * most):
                places[row] = place
        at_places = [row for rows in members for row in rows + [0] * (most - len(rows))]
        has_place = [bool(self._ranges[slot]) for slot in self._rows]
        return Lanes(
            n,
            torch.tensor(at_places, device=self._device),
            torch.tensor(places, device=self._device),
            None if all(has_place) else torch.tensor(has_place, device=self._device),
        )

    @property
    def mask(self) -> torch.Tensor | None:
        """Whether a column is of the row's own adapter, [rows, columns]; None: they all are."""
        if len(set(self._rows)) == 1 and self._ranges[self._rows[0]]:
            return None
        if self._mask is None:
            own = torch.tensor(
                [[self._ranges[slot].start, self._ranges[slot].stop] for slot in self._rows],
                device=self._device,
            )
            columns = torch.arange(self.span.start, self.span.stop, device=self._device)
            self._mask = (columns >= own[:, :1]) & (columns < own[:, 1:])
        return self._mask
