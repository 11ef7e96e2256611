"""The rows of a pass that run through the layers in two streams (MEFT, arXiv 2306.00477).

Both streams are what they are in training, integers on the grid of `worker.fixed_point`, so that
a row gets the very numbers that its adapter was trained with; rows in one stream are not touched.
With F and G of section 3.1 and λ = 2^-bits, x1 and x2 become:

* meft1: F is the layer, G the bottleneck ``coupling``; ``(x2 + G(y1), y1)``, ``y1 = λ·x1 + F(x2)``
* meft2: F is the bottleneck, G the layer; ``(λ·x2 + G(y1), y1)``, ``y1 = x1 + F(x2)``
* meft3: F is the attention, G the feed-forward; ``(y1, λ·x2 + G(y1))``, ``y1 = λ·x1 + F(x2)``

What goes on to the next module is x2, in meft2 x1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from worker.fixed_point import LIMIT, from_grid, to_grid
from worker.inference.engine.weights import TwoStreams, Variant

Couple = Callable[[torch.Tensor], torch.Tensor]
"""Maps [rows, T, d] to what the rows' bottlenecks ``coupling`` make of it."""


@dataclass(slots=True)
class _Group:
    """The rows of one variant: which, [n]; their bits, [n, 1, 1]; and their streams, [n, T, d]."""

    variant: Variant
    rows: torch.Tensor
    bits: torch.Tensor
    x1: torch.Tensor
    x2: torch.Tensor
    is_finite: torch.Tensor

    def start(self, hidden: torch.Tensor) -> None:
        mine = hidden[self.rows]
        self.is_finite = torch.ones_like(self.bits, dtype=torch.bool)
        self.x1 = self.x2 = self.on_grid(mine)

    def on_grid(self, values: torch.Tensor) -> torch.Tensor:
        """Return numbers of the grid; rows that hold others than finite ones are noted."""
        self.is_finite = self.is_finite & (values.abs().amax((1, 2), keepdim=True) < LIMIT)
        return to_grid(values.masked_fill(~self.is_finite, 0.0))

    def put(self, numbers: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden` with these rows being `numbers`, NaN where they were not finite."""
        values = from_grid(numbers, hidden.dtype).masked_fill(~self.is_finite, torch.nan)
        return hidden.index_copy(0, self.rows, values)


class StreamRows:
    """The state of one pass; layers call `enter`, `between` where `splits`, and `leave`."""

    def __init__(self, groups: list[_Group]) -> None:
        self._groups = groups
        self.splits = any(group.variant == "meft3" for group in groups)
        """Whether layers have to be taken apart, into attention and feed-forward."""

    @classmethod
    def of(cls, by_row: Sequence[TwoStreams | None], device: torch.device) -> "StreamRows | None":
        groups = []
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        for variant in sorted({each.variant for each in by_row if each is not None}):
            mine = [
                (i, s.bits) for i, s in enumerate(by_row) if s is not None and s.variant == variant
            ]
            rows, bits = torch.tensor(mine, device=device).unbind(1)
            groups.append(_Group(variant, rows, bits[:, None, None], nothing, nothing, nothing))
        return cls(groups) if groups else None

    def enter(self, hidden: torch.Tensor, couple: Couple, *, is_first: bool) -> torch.Tensor:
        """Return what a layer reads, given what it would read in one stream."""
        for group in self._groups:
            if is_first:
                group.start(hidden)
            hidden = group.put(group.x2, hidden)
            if group.variant == "meft2":
                y1 = group.x1 + group.on_grid(couple(hidden)[group.rows])
                group.x1, group.x2 = group.x2, y1
                hidden = group.put(y1, hidden)
        return hidden

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the feed-forward's half of a layer reads, given what the other half gave."""
        for group in self._groups:
            if group.variant == "meft3":
                group.x1 = (group.x1 >> group.bits) + group.on_grid(hidden[group.rows])
                hidden = group.put(group.x1, hidden)
        return hidden

    def leave(self, hidden: torch.Tensor, couple: Couple) -> torch.Tensor:
        """Return what goes on, given what the layer gave."""
        for group in self._groups:
            found = group.on_grid(hidden[group.rows])
            match group.variant:
                case "meft1":
                    y1 = (group.x1 >> group.bits) + found
                    hidden = group.put(y1, hidden)
                    group.x1 = group.x2 + group.on_grid(couple(hidden)[group.rows])
                    group.x2 = y1
                case "meft2":
                    group.x1 = (group.x1 >> group.bits) + found
                    hidden = group.put(group.x1, hidden)
                case _:
                    group.x2 = (group.x2 >> group.bits) + found
                    hidden = group.put(group.x2, hidden)
        return hidden
