"""The adapters of the running sequences: one slot each, side by side in every layer's buffers.

A copy into a slot is the only work that the engine's thread does to load an adapter. On a CPU
compiled loops take matrices of low rank from where the adapter itself has them, without a copy.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from worker.inference.engine.bottlenecks import BottleneckBuffers
from worker.inference.engine.columns import Columns
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.streams import StreamRows
from worker.inference.engine.weights import (
    VECTORS,
    AdapterWeights,
    ModuleChange,
    TwoStreams,
)
from worker.kernels import Numbers, tiles
from worker.kernels.matrix import LowRank, Rows, add_packed_, in_order
from worker.kernels.operators import add_low_rank_


class LayerBuffers:
    """What all slots make of one module of the base.

    Low rank: `a` [C, in], `b` [C, out] (transposed), in columns; `vectors` by slot; bottlenecks by
    their places.
    """

    def __init__(self, shape: ModuleShape, slots: "Slots") -> None:
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        self.vectors: dict[str, torch.Tensor] = {}
        self.low_rank: set[int] = set()
        self.users: dict[str, set[int]] = {name: set() for name in VECTORS}
        self.bottlenecks: dict[str, BottleneckBuffers] = {}
        self._shape = shape
        self._slots = slots
        self._by_lane: tuple[tuple[slice, int], torch.Tensor, torch.Tensor] | None = None

    def put(self, index: int, change: ModuleChange | None) -> None:
        """Make the module's part of slot `index` that of `change`, and nothing where it is None."""
        if self._slots.compiled is None:
            self._put_low_rank(index, change)
        for name, users in self.users.items():
            vector = getattr(change, name) if change is not None else None
            users.discard(index)
            if vector is not None:
                users.add(index)
                self._vectors(name)[index] = vector
            elif name in self.vectors:
                self.vectors[name][index] = VECTORS[name]
        places = change.bottlenecks if change is not None else {}
        for place in {*places, *self.bottlenecks}:
            if place not in self.bottlenecks:
                self.bottlenecks[place] = BottleneckBuffers(
                    self._shape.out_features,
                    self._slots.n_slots,
                    self._slots.bottlenecks,
                    self._slots.like,
                )
            self.bottlenecks[place].put(index, places.get(place))

    def by_lane(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Aᵀ [n, in, width] and B [n, width, out] of the lanes of the next pass."""
        columns = self._slots.low_rank
        assert columns.lanes is not None
        kind = columns.span, columns.lanes.n
        if self._by_lane is None or self._by_lane[0] != kind:
            assert self.a is not None
            assert self.b is not None
            a, b = (each[columns.span].unflatten(0, (kind[1], -1)) for each in (self.a, self.b))
            self._by_lane = kind, a.transpose(1, 2), b
        return self._by_lane[1:]

    def _put_low_rank(self, index: int, change: ModuleChange | None) -> None:
        self.low_rank.discard(index)
        if self.a is None and (change is None or change.a is None):
            return
        size = self._slots.low_rank.size
        if self.a is None or len(self.a) < size:
            self._slots.generation += 1
            self._by_lane = None
        self.a = _grown(self.a, size, self._shape.in_features, self._slots.like)
        self.b = _grown(self.b, size, self._shape.out_features, self._slots.like)
        mine, rank = self._slots.low_rank.of(index), 0
        if change is not None and change.a is not None and change.b is not None:
            if change.scale != 1:
                raise ValueError("A matrix is yet to be multiplied by its scale: `prepare` does.")
            rank = change.rank
            self.a[mine.start : mine.start + rank] = change.a
            self.b[mine.start : mine.start + rank] = change.b.T
            self.low_rank.add(index)
        # What the slot's last adapter left is multiplied by 0 elsewhere, and 0 × NaN is NaN.
        self.a[mine.start + rank : mine.stop] = 0
        self.b[mine.start + rank : mine.stop] = 0

    def _vectors(self, name: str) -> torch.Tensor:
        if name not in self.vectors:
            size = self._shape.in_features if name == "gain_in" else self._shape.out_features
            # One row more than slots: that of the base model.
            self.vectors[name] = torch.full(
                (self._slots.n_slots + 1, size),
                VECTORS[name],
                dtype=torch.float32,
                device=self._slots.like.device,
            )
        return self.vectors[name]


def _grown(
    buffer: torch.Tensor | None, n_columns: int, width: int, like: torch.Tensor
) -> torch.Tensor:
    if buffer is not None and len(buffer) >= n_columns:
        return buffer
    larger = like.new_zeros(n_columns, width)
    if buffer is not None:
        larger[: len(buffer)] = buffer
    return larger


class Slots:
    """At most `n_slots` adapters; the base model needs none.

    Args:
        shapes: The modules that adapters may change.
        n_slots: How many adapters may take part in a pass.
        like: A tensor of the dtype of the adapters' matrices, on the device of the base model.
        compiled: The dtype of matrices of low rank, if the loops of `kernels` take them.
    """

    def __init__(
        self,
        shapes: Mapping[str, ModuleShape],
        n_slots: int,
        like: torch.Tensor,
        compiled: torch.dtype | None = None,
    ) -> None:
        self.n_slots = n_slots
        self.like = like
        self.compiled = compiled
        self.numbers = {path: number for number, path in enumerate(shapes)}
        """The place of each module in `places`."""
        reads_pairs = compiled == torch.bfloat16 and tiles.is_supported()
        self.in_tiles = {
            path
            for path, shape in shapes.items()
            if reads_pairs and shape.kind == "linear" and shape.in_features % 2 == 0
        }
        """Modules whose matrices of low rank are read by tiles."""
        self.low_rank = Columns(n_slots, like.device)
        self.bottlenecks = Columns(n_slots, like.device)
        self.layers = {path: LayerBuffers(shape, self) for path, shape in shapes.items()}
        self._digests: list[str | None] = [None] * n_slots
        self._is_filled = [False] * n_slots
        self._holds_more = [False] * n_slots  # than matrices of low rank that are elsewhere
        self._nothing = np.zeros((len(shapes), 3), np.int64)
        self._streams: list[TwoStreams | None] = [None] * (n_slots + 1)
        self._order: list[int] = list(range(n_slots))  # least recently used first
        self.evictions = 0
        """Adapters that made room for others so far."""
        self.generation = 0
        """Grows whenever the memory of low-rank matrices moves."""
        self.busy: Set[str | None] = frozenset()
        """Adapters of running sequences: their slots are not given to others."""
        self.rows: list[int] = []
        """For the next pass, the slot of every row; `n_slots` stands for the base model."""
        self.active: frozenset[int] = frozenset()
        self.places: Numbers | None = None
        """For the next pass, where the matrices of each row's adapter are [rows, modules, 3]."""
        self.told = Rows(0, 0, 0)
        """The same, as products of several modules are told."""
        self.is_touched: list[bool] = []
        """Which modules have any of them."""
        self.adds_only = False
        """Whether no adapter of the next pass does more than add a product of low rank."""
        self.takes_all = False
        """Whether the next pass multiplies by all columns there are, as `use_all` lets it."""
        self.streams: StreamRows | None = None
        """The rows of the next pass that run in two streams, if there are any."""
        self._index: torch.Tensor | None = None

    def prepare(self, adapter: AdapterWeights) -> AdapterWeights:
        """Return an adapter as `use` takes it, in memory of its own; any thread may do so, once."""
        if self.compiled is None:
            return adapter.cast(self.like.dtype)
        adapter = adapter.cast(self.like.dtype, self.compiled, self._in_order(adapter))
        places = self._nothing.copy()
        for path, change in adapter.modules.items():
            if change.low_rank is not None:
                places[self.numbers[path]] = change.low_rank.place
            elif change.a is not None and change.b is not None:
                places[self.numbers[path]] = change.a.data_ptr(), change.b.data_ptr(), change.rank
        return replace(adapter, places=places)

    def _in_order(self, adapter: AdapterWeights) -> dict[str, LowRank]:
        """Return, by module, matrices as tiles read them, of those that are read by tiles."""
        matrices, scales = {}, []
        for path, change in adapter.modules.items():
            if path in self.in_tiles and change.a is not None and change.b is not None:
                matrices[path] = change.a, change.b
                scales.append(change.scale)
        return dict(zip(matrices, in_order(list(matrices.values()), scales), strict=True))

    def add_(self, outputs: Sequence[tuple[torch.Tensor, str]], x: torch.Tensor) -> None:
        """Add what each row's adapter makes of `x` to outputs of modules, in place.

        Args:
            outputs: At most 4 outputs [rows, …, out] in the dtype of the loops, and whose they are.
            x: What these modules take [rows, …, in], in the same dtype.
        """
        assert self.places is not None
        assert self.compiled is not None
        rest = []
        for y, path in outputs:
            number = self.numbers[path]
            if not self.is_touched[number]:
                continue
            if path in self.in_tiles:
                add_packed_(y, x, self.told, number)
            else:
                rest.append((y, number))
        if rest:
            add_low_rank_(rest, x, self.places, self.compiled)

    @torch.inference_mode()
    def use(self, adapters: Sequence[AdapterWeights | None]) -> None:
        """Set the adapter of every row of the next pass; one that has no slot gets one.

        Raises:
            ValueError: there are more adapters, with the busy ones, than slots.
        """
        distinct = {adapter.digest: adapter for adapter in adapters if adapter is not None}
        kept = self.busy | distinct.keys()
        slots = {digest: i for i, digest in enumerate(self._digests) if digest is not None}
        for digest, adapter in distinct.items():
            if digest not in slots:
                slots[digest] = self._give(adapter, kept)
            self._order.remove(slots[digest])
            self._order.append(slots[digest])
            if not self._is_filled[slots[digest]]:
                self._fill(slots[digest], adapter)
        self.rows = [self.n_slots if each is None else slots[each.digest] for each in adapters]
        self.takes_all = False
        self.adds_only = all(each.adds_only for each in distinct.values())
        self.active = frozenset(self.rows) - {self.n_slots}
        self._index = None
        if self.compiled is not None:
            self._find(adapters)
        else:
            self.low_rank.use(self.rows, self.active)
        self.bottlenecks.use(self.rows, self.active)
        self.streams = StreamRows.of([self._streams[slot] for slot in self.rows], self.like.device)

    def _find(self, adapters: Sequence[AdapterWeights | None]) -> None:
        """Look up where the matrices of each row are."""
        places: list[Numbers] = []
        for adapter in adapters:
            if adapter is not None and adapter.places is None:
                raise ValueError(f"Adapter {adapter.digest} was not prepared for these slots.")
            own = None if adapter is None else adapter.places
            places.append(self._nothing if own is None else own)
        self.places = np.stack(places)
        self.told = Rows(self.places.ctypes.data, self._nothing.size, len(places))
        ranks: Any = self.places[:, :, 2].max(axis=0)
        self.is_touched = [rank > 0 for rank in ranks.tolist()]

    def use_all(self, own: torch.Tensor) -> None:
        """Let the next pass be one that serves any adapters of low rank, as `Columns.use_all`."""
        self.takes_all = True
        self.low_rank.use_all(own)

    def digests(self) -> list[str]:
        """Return the adapters that have a slot."""
        return [digest for digest in self._digests if digest is not None]

    @property
    def index(self) -> torch.Tensor:
        """The slot of every row, [rows]."""
        if self._index is None:
            self._index = torch.tensor(self.rows, device=self.like.device)
        return self._index

    def _give(self, adapter: AdapterWeights, kept: Set[str | None]) -> int:
        """Give `adapter` a slot that holds none of `kept`, and return the slot's index."""
        free = [i for i in self._order if self._digests[i] is None or self._digests[i] not in kept]
        if not free:
            raise ValueError(f"All {self.n_slots} adapter slots are in use.")
        # An empty slot rather than the least recently used one.
        index = min(free, key=lambda i: self._digests[i] is not None)
        self.evictions += self._digests[index] is not None
        self._digests[index] = adapter.digest
        self._is_filled[index] = False
        return index

    def _fill(self, index: int, adapter: AdapterWeights) -> None:
        """Copy `adapter` into its slot, in place of what was there."""
        self._is_filled[index] = True
        has_more = self.compiled is None or not adapter.adds_only
        if not has_more and not self._holds_more[index]:
            return
        self._holds_more[index] = has_more
        self.low_rank.place(index, adapter.rank)
        self.bottlenecks.place(index, adapter.width)
        for path, layer in self.layers.items():
            layer.put(index, adapter.modules.get(path))
        self._streams[index] = adapter.streams
