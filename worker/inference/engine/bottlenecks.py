"""Small feed-forwards of all slots at one place of the model, each row going through its own.

The bottlenecks stand side by side, so that a pass makes two products whatever the number of
adapters; what a row computes of the others' is put to 0 between them.
"""

from collections.abc import Set

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from worker.inference.engine.columns import Columns
from worker.inference.engine.weights import Bottleneck


class BottleneckBuffers:
    """`down` [C, d], `down_bias` [C] and `up` [C, d] (transposed) by column, `up_bias` by slot.

    Args:
        width: d.
        n_slots: How many adapters there may be; one row more stands for the base model.
        columns: Where each adapter is.
        like: A tensor of the dtype and device of the adapters.
    """

    def __init__(self, width: int, n_slots: int, columns: Columns, like: torch.Tensor) -> None:
        self._columns = columns
        self._down = like.new_zeros(columns.size, width)
        self._down_bias = like.new_zeros(columns.size)
        self._up = like.new_zeros(columns.size, width)
        self._up_bias = like.new_zeros(n_slots + 1, width)
        self._activations: dict[int, str] = {}

    def is_used_by(self, slots: Set[int]) -> bool:
        return not slots.isdisjoint(self._activations)

    def put(self, slot: int, bottleneck: Bottleneck | None) -> None:
        """Make a slot's part that of `bottleneck`, and nothing where it is None."""
        for name in ("_down", "_down_bias", "_up"):
            old = getattr(self, name)
            if len(old) < self._columns.size:
                larger = old.new_zeros(self._columns.size, *old.shape[1:])
                larger[: len(old)] = old
                setattr(self, name, larger)
        mine = self._columns.of(slot)
        # What the slot's last adapter left is multiplied by 0 elsewhere, and 0 × NaN is NaN.
        for buffer in (self._down, self._down_bias, self._up):
            buffer[mine.start : mine.stop] = 0
        self._up_bias[slot] = 0
        self._activations.pop(slot, None)
        if bottleneck is None:
            return
        stop = mine.start + bottleneck.width
        self._down[mine.start : stop] = bottleneck.down
        self._down_bias[mine.start : stop] = bottleneck.down_bias
        self._up[mine.start : stop] = bottleneck.up.T
        self._up_bias[slot] = bottleneck.up_bias
        self._activations[slot] = bottleneck.activation

    def added(self, x: torch.Tensor, index: torch.Tensor, active: Set[int]) -> torch.Tensor:
        """Return what each row's bottleneck makes of `x` [rows, …, d]; 0 in rows without one.

        Args:
            x: What the bottlenecks read.
            index: The slot of every row.
            active: The slots of adapters among them.
        """
        span, mask = self._columns.span, self._columns.mask
        hidden = functional.linear(x.to(self._down.dtype), self._down[span], self._down_bias[span])
        hidden = self._activated(hidden, active)
        if mask is not None:
            hidden = torch.where(beside(mask, x.dim()), hidden, 0.0)
        return hidden @ self._up[span] + beside(self._up_bias[index], x.dim())

    def _activated(self, hidden: torch.Tensor, active: Set[int]) -> torch.Tensor:
        slots = sorted(active & self._activations.keys())
        results = {
            kind: ACT2FN[kind](hidden) for kind in {self._activations[slot] for slot in slots}
        }
        if len(results) == 1:
            [found] = results.values()
            return found
        found = torch.zeros_like(hidden)
        for slot in slots:
            mine, first = self._columns.of(slot), self._columns.span.start
            stretch = slice(mine.start - first, mine.stop - first)
            found[..., stretch] = results[self._activations[slot]][..., stretch]
        return found


def beside(by_row: torch.Tensor, n_dims: int) -> torch.Tensor:
    """View [rows, m] as [rows, 1, …, m], to stand beside a tensor of `n_dims` dimensions."""
    return by_row.view(by_row.shape[0], *[1] * (n_dims - 2), by_row.shape[1])
