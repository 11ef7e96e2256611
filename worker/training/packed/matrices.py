"""Adapters' matrices, and their casts to the dtype of the product: once for a pass."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import nn

from worker.kernels import Numbers, pairs, products
from worker.kernels.team import bits_of
from worker.training.packed import layout, pool


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapter's matrices of one layer: A [r, inputs], B [outputs, r], float32."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float

    def factor(self, *, training: bool) -> float:
        """Return by what A is multiplied: with dropout, over the share that is kept."""
        return self.scale / (1 - self.dropout) if training else self.scale


@dataclass(frozen=True, slots=True)
class Column:
    """One layer of a group: its pair, and where things of it are.

    `output` are the columns of its output, and `hidden` those of its ``A x``. `a` and `b` say
    behind how many numbers of the group's matrices its own begin.
    """

    index: int
    pair: Pair
    output: slice
    hidden: slice
    a: int
    b: int


class Columns:
    """What one adapter has in a group of layers: all its A, one below the other, then each B.

    Args:
        outputs: Of each layer of the group.
        row: The pair of each, if it has one.
        start: Behind how many numbers of all the adapter's matrices these begin.
    """

    def __init__(self, outputs: Sequence[int], row: Sequence[Pair | None], start: int) -> None:
        known = [(index, pair) for index, pair in enumerate(row) if pair is not None]
        self.pairs = [pair for _, pair in known]
        self.parameters = [pair.a for pair in self.pairs] + [pair.b for pair in self.pairs]
        self.sizes = [matrix.numel() for matrix in self.parameters]
        self.rank = sum(pair.a.shape[0] for pair in self.pairs)
        self.size = sum(self.sizes)
        self.start = start
        self.rates = [pair.dropout for pair in self.pairs]
        self.drops = any(self.rates)
        starts = np.cumsum([0, *self.sizes]).tolist()
        self._columns: dict[int, Column] = {}
        hidden = 0
        for place, (index, pair) in enumerate(known):
            first, rank = sum(outputs[:index]), pair.a.shape[0]
            self._columns[index] = Column(
                *(index, pair, slice(first, first + outputs[index])),
                *(slice(hidden, hidden + rank), starts[place], starts[place + len(known)]),
            )
            hidden += rank
        self._tables = [self._table(training) for training in (False, True)]
        self._places = [int(table.ctypes.data) for table in self._tables]

    def __iter__(self) -> Iterator[Column]:
        return iter(self._columns.values())

    def __len__(self) -> int:
        return len(self._columns)

    def of_layer(self, index: int) -> Column | None:
        return self._columns.get(index)

    def table(self, *, training: bool) -> int:
        """Return where loops read of it (`kernels.pairs`)."""
        return self._places[training]

    def _table(self, training: bool) -> Numbers:
        rows = [
            (
                *(each.hidden.start, each.hidden.stop - each.hidden.start),
                *(each.output.start, each.output.stop - each.output.start, each.a, each.b),
                bits_of(each.pair.factor(training=training)),
            )
            for each in self
        ]
        return np.array(rows, dtype=np.int64)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return parts of flat [size], one after the other, shaped as `parameters`."""
        pieces = flat.split(self.sizes)
        return [piece.view(each.shape) for piece, each in zip(pieces, self.parameters, strict=True)]


class Matrices:
    """All matrices of each adapter in the groups of a model."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Columns]] = {}

    def add(
        self, outputs: Sequence[int], rows: Mapping[str, Sequence[Pair | None]]
    ) -> dict[str, Columns]:
        """Take the pairs of each adapter in a group; return those of adapters that have any there.

        Args:
            outputs: Of each layer of the group.
            rows: The pair that each layer has, if any, by adapter.
        """
        added = {}
        for adapter, row in rows.items():
            known = self._columns.setdefault(adapter, [])
            start = known[-1].start + known[-1].size if known else 0
            columns = Columns(outputs, row, start)
            if len(columns):
                known.append(columns)
                added[adapter] = columns
        return added

    def cast(self, adapter: str, like: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Return an adapter's matrices one after the other, A times its factor, for one pass.

        They are cast for the first group of a pass: a fused optimizer changes weights without
        telling, so no cast outlives the active layout.

        Args:
            adapter: Which has matrices here.
            like: Has the dtype and the device of the product.
            training: Whether dropout drops what it does.
        """
        casts = layout.current().casts
        key = (id(self), adapter, training, like.dtype)
        found = casts.get(key)
        if found is None:
            found = casts[key] = _cast(self._columns[adapter], like, training)
        return found


def _cast(groups: Sequence[Columns], like: torch.Tensor, training: bool) -> torch.Tensor:
    flat = pool.empty(like, groups[-1].start + groups[-1].size)
    factors = [[pair.factor(training=training) for pair in group.pairs] for group in groups]
    if products.is_supported(like):
        told, place = [sum(len(group.parameters) for group in groups)], flat.data_ptr()
        for group, own in zip(groups, factors, strict=True):
            all_factors = chain(own, [1.0] * len(own))
            for matrix, n, factor in zip(group.parameters, group.sizes, all_factors, strict=True):
                told += (matrix.data_ptr(), n, bits_of(factor), place)
                place += n * flat.element_size()
        pairs.cast(told, flat.numel())
        return flat
    casts = [group.views(flat[group.start : group.start + group.size]) for group in groups]
    all_a = [pair.a.detach() for group in groups for pair in group.pairs]
    all_b = [pair.b.detach() for group in groups for pair in group.pairs]
    # In one call each: there are hundreds of these, and they are small.
    scaled = torch._foreach_mul(all_a, list(chain.from_iterable(factors)))
    halves = [(views[: len(views) // 2], views[len(views) // 2 :]) for views in casts]
    torch._foreach_copy_([view for half, _ in halves for view in half], scaled)
    torch._foreach_copy_([view for _, half in halves for view in half], all_b)
    return flat
