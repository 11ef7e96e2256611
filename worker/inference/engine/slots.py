"""The adapters of the running sequences: one slot each, side by side in every layer's buffers.

A slot holds its adapter's A and B in a range of columns that is the same in all layers, so that
one mask tells every layer which columns are a row's own. A copy into a slot is the only work that
the engine's thread does to load an adapter.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch

from worker.inference.engine.params import LinearShape
from worker.inference.engine.weights import AdapterWeights, ModuleChange

COLUMNS = 32
"""The number of columns is a multiple of this: growing copies every buffer."""


@dataclass(slots=True)
class _Slot:
    digest: str
    columns: range


class LayerBuffers:
    """What all slots make of one layer: `a` [C, in], `b` [C, out] (transposed), gains by slot."""

    def __init__(self, shape: LinearShape, n_slots: int) -> None:
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        self.gains: dict[str, torch.Tensor] = {}
        self.low_rank: set[int] = set()
        self.gained: dict[str, set[int]] = {"gain_in": set(), "gain": set(), "shift": set()}
        self._shape = shape
        self._n_slots = n_slots

    def put(self, slot: _Slot, index: int, change: ModuleChange | None, like: torch.Tensor) -> None:
        """Make the layer's part of slot `index` that of `change`, and nothing where it is None."""
        self._put_low_rank(slot, index, change, like)
        for name, users in self.gained.items():
            vector = getattr(change, name) if change is not None else None
            users.discard(index)
            if vector is not None:
                users.add(index)
                self._gain(name, like)[index] = vector
            elif name in self.gains:
                self.gains[name][index] = _neutral(name)

    def grow(self, n_columns: int) -> None:
        for name in ("a", "b"):
            old = getattr(self, name)
            if old is not None:
                larger = old.new_zeros(n_columns, old.shape[1])
                larger[: old.shape[0]] = old
                setattr(self, name, larger)

    def allocate(self, n_columns: int, like: torch.Tensor) -> None:
        if self.a is None:
            self.a = like.new_zeros(n_columns, self._shape.in_features)
            self.b = like.new_zeros(n_columns, self._shape.out_features)

    def _put_low_rank(
        self, slot: _Slot, index: int, change: ModuleChange | None, like: torch.Tensor
    ) -> None:
        self.low_rank.discard(index)
        if self.a is None or self.b is None:
            return
        start, stop, rank = slot.columns.start, slot.columns.stop, 0
        if change is not None and change.a is not None and change.b is not None:
            rank = change.rank
            self.a[start : start + rank] = change.a
            self.b[start : start + rank] = change.b.T
            self.low_rank.add(index)
        # What the slot's last adapter left is multiplied by 0 elsewhere, and 0 × NaN is NaN.
        self.a[start + rank : stop] = 0
        self.b[start + rank : stop] = 0

    def _gain(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in self.gains:
            size = self._shape.in_features if name == "gain_in" else self._shape.out_features
            # One row more than slots: that of the base model.
            self.gains[name] = torch.full(
                (self._n_slots + 1, size), _neutral(name), dtype=torch.float32, device=like.device
            )
        return self.gains[name]


def _neutral(name: str) -> float:
    return 0.0 if name == "shift" else 1.0


class Slots:
    """At most `n_slots` adapters; the base model needs none.

    Args:
        linears: The layers that adapters may change.
        n_slots: How many adapters may take part in a pass.
        like: A tensor of the dtype of A and B, on the device of the base model.
    """

    def __init__(
        self, linears: Mapping[str, LinearShape], n_slots: int, like: torch.Tensor
    ) -> None:
        self.layers = {path: LayerBuffers(shape, n_slots) for path, shape in linears.items()}
        self._like = like
        self._slots: list[_Slot | None] = [None] * n_slots
        self._order: list[int] = list(range(n_slots))  # least recently used first
        self._n_columns = 0
        self.evictions = 0
        """Adapters that made room for others so far."""
        self.busy: Set[str | None] = frozenset()
        """Adapters of running sequences: their slots are not given to others."""
        self.rows: list[int] = []
        """For the next pass, the slot of every row; `n_slots` stands for the base model."""
        self.active: frozenset[int] = frozenset()
        self.columns = slice(0, 0)
        self._index: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    @torch.inference_mode()
    def use(self, adapters: Sequence[AdapterWeights | None]) -> None:
        """Set the adapter of every row of the next pass; one that has no slot gets one.

        Raises:
            ValueError: there are more adapters, with the busy ones, than slots.
        """
        distinct = {adapter.digest: adapter for adapter in adapters if adapter is not None}
        kept = self.busy | distinct.keys()
        places = {slot.digest: i for i, slot in enumerate(self._slots) if slot is not None}
        for digest, adapter in distinct.items():
            if digest not in places:
                places[digest] = self._place(adapter, kept)
            self._order.remove(places[digest])
            self._order.append(places[digest])
        base = len(self._slots)
        self.rows = [base if each is None else places[each.digest] for each in adapters]
        self.active = frozenset(self.rows) - {base}
        self._index = self._mask = None
        ranges = [slot.columns for i in self.active if (slot := self._slots[i]) and slot.columns]
        self.columns = slice(
            min((each.start for each in ranges), default=0),
            max((each.stop for each in ranges), default=0),
        )

    def digests(self) -> list[str]:
        """Return the adapters that have a slot."""
        return [slot.digest for slot in self._slots if slot is not None]

    @property
    def index(self) -> torch.Tensor:
        """The slot of every row, [rows]."""
        if self._index is None:
            self._index = torch.tensor(self.rows, device=self._like.device)
        return self._index

    @property
    def mask(self) -> torch.Tensor | None:
        """Whether a column is of the row's own adapter, [rows, columns]; None: they all are."""
        if len(self.active) == 1 and len(self.active) == len(set(self.rows)):
            return None
        if self._mask is None:
            ranges = [s.columns if s is not None else range(0) for s in (*self._slots, None)]
            own = torch.tensor([[ranges[i].start, ranges[i].stop] for i in self.rows])
            own = own.to(self._like.device)
            columns = torch.arange(self.columns.start, self.columns.stop, device=self._like.device)
            self._mask = (columns >= own[:, :1]) & (columns < own[:, 1:])
        return self._mask

    def _place(self, adapter: AdapterWeights, kept: Set[str | None]) -> int:
        """Copy `adapter` into a slot that holds none of `kept`, and return the slot's index."""
        free = [i for i in self._order if self._digest(i) not in kept]
        if not free:
            raise ValueError(f"All {len(self._slots)} adapter slots are in use.")
        # An empty slot rather than the least recently used one.
        index = min(free, key=lambda i: self._slots[i] is not None)
        self.evictions += self._slots[index] is not None
        self._slots[index] = None
        slot = self._slots[index] = _Slot(adapter.digest, self._free_columns(adapter.rank))
        for path, layer in self.layers.items():
            change = adapter.modules.get(path)
            if change is not None and change.a is not None:
                layer.allocate(self._n_columns, self._like)
            layer.put(slot, index, change, self._like)
        return index

    def _digest(self, index: int) -> str:
        slot = self._slots[index]
        return "" if slot is None else slot.digest

    def _free_columns(self, width: int) -> range:
        """Return the first gap of `width` columns, growing the buffers where there is none."""
        start = 0
        for taken in sorted((s.columns for s in self._slots if s), key=lambda each: each.start):
            if taken.start - start >= width:
                break
            start = max(start, taken.stop)
        if start + width > self._n_columns:
            self._n_columns = -(-(start + width) // COLUMNS) * COLUMNS
            for layer in self.layers.values():
                layer.grow(self._n_columns)
        return range(start, start + width)
