"""Where the adapters of the slots stand in buffers that they share: a range of columns each.

The ranges are the same in all layers, so that one mask tells every layer which columns are a
row's own.
"""

from collections.abc import Sequence, Set

import torch

GRAIN = 32
"""The number of columns is a multiple of this: growing copies every buffer."""


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
