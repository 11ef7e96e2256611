"""The key-value cache of the sequences that decode together: one row each, side by side."""

from collections.abc import Container

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from worker.inference.engine.caches import States, states_of
from worker.inference.engine.row_attention import Rows, mark
from worker.kernels.operators import store_

GROWTH = 256
"""Tokens by which rows grow at once: growing copies all rows."""


View = tuple[Cache, torch.Tensor, torch.Tensor]
"""What a model takes to feed one token to each of n rows: the cache, the tokens' positions [n, 1],
and what to add to the attention scores [n, 1, 1, width]: the lowest number past the end of a row,
else 0."""


class _View:
    """The rows that the next forward pass feeds, one token each; `width` includes that token."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.index = torch.empty(0, dtype=torch.long)
        self.positions = torch.empty(0, dtype=torch.long)
        self.width = 0
        self.marks: Rows | None = None


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, capacity, head size] each."""

    def __init__(self, view: _View, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._view = view
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: a layer is made of the first sequence's tensors."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token [n, heads, 1, head size] a row; return the rows up to the width."""
        view = self._view
        keys, values = (each[view.rows, :, : view.width] for each in self.buffers())
        if view.marks is not None and key_states.dtype == keys.dtype:
            store_((keys, values), (key_states, value_states), view.marks.lengths)
            mark(keys, view.marks)
        else:
            keys[view.index, :, view.positions] = key_states[:, :, 0]
            values[view.index, :, view.positions] = value_states[:, :, 0]
        return keys, values

    def buffers(self) -> States:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._view.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._view.width, 0

    def get_max_length(self) -> int:
        return -1


class RowCache:
    """Rows 0, 1, …, each the cache of one sequence; the last row moves into a gap.

    Args:
        n_reserved: Rows that there is memory for from the first one on, so that it stays in its
            place while sequences come and go.
        n_tokens: Tokens that all reserved rows may have together; long rows are fewer.
        compiled: Whether the loops of `kernels` write and read the rows that `feed` is given.
    """

    def __init__(self, n_reserved: int = 0, n_tokens: int = 0, *, compiled: bool = False) -> None:
        self.generation = 0
        """Grows whenever memory moves."""
        self._reserved = (n_reserved, n_tokens)
        self._compiled = compiled
        self._lengths: list[int] = []
        self._view = _View()
        self._layers: list[_RowLayer] = []

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def n_rows(self) -> int:
        """Rows that there is memory for."""
        return len(self._layers[0].buffers()[0]) if self._layers else 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self._lengths

    @torch.inference_mode()
    def append(self, cache: DynamicCache) -> None:
        """Copy the cache of a sequence (batch size 1) into a new last row."""
        row, length = len(self), cache.get_seq_length()
        layers = states_of(cache)
        if not self._layers:
            self._layers = [
                _RowLayer(self._view, keys[:, :, :0], values[:, :, :0]) for keys, values in layers
            ]
        self.make_room(row + 1, length)
        for mine, layer in zip(self._layers, layers, strict=True):
            for buffer, states in zip(mine.buffers(), layer, strict=True):
                buffer[row, :, :length] = states[0]
        self._lengths.append(length)

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """Forget `row`; the last row takes its place.

        Without rows no memory is kept, but that of reserved rows while they are short.
        """
        last = len(self) - 1
        length = self._lengths[last]
        for layer in self._layers:
            for buffer in layer.buffers():
                buffer[row, :, :length] = buffer[last, :, :length]
        self._lengths[row] = length
        self._lengths.pop()
        if not self._lengths and (not self._reserved[0] or self._capacity > GROWTH):
            self._layers = []

    @property
    def _capacity(self) -> int:
        return self._layers[0].buffers()[0].shape[2]

    @torch.inference_mode()
    def make_room(self, n_rows: int, width: int) -> None:
        """See to memory for `n_rows` rows of `width` tokens each."""
        if n_rows <= self.n_rows and width <= self._capacity:
            return
        n_reserved, n_tokens = self._reserved
        if width <= self._capacity:
            width = self._capacity
        else:
            width = -(-width // GROWTH) * GROWTH
            n_rows = max(n_rows, len(self))
        n_rows = max(n_rows, min(n_reserved, n_tokens // width))
        self.generation += 1
        for layer in self._layers:
            layer.keys, layer.values = (_grown(each, n_rows, width) for each in layer.buffers())

    @torch.inference_mode()
    def feed(self, rows: slice, dtype: torch.dtype) -> View:
        """Make room for one more token in each of `rows`, to be fed in one forward pass."""
        lengths = self._lengths[rows]
        width = max(lengths) + 1
        self.make_room(len(self), width)
        device = self._layers[0].buffers()[0].device
        view = self.view(rows, torch.tensor(lengths, device=device), width, dtype)
        if self._compiled:
            self._view.marks = Rows(np.array(lengths) + 1, view[2])
        return view

    def view(self, rows: slice, positions: torch.Tensor, width: int, dtype: torch.dtype) -> View:
        """As `feed`, for tokens at `positions` [n] of `rows`, which there has to be room for."""
        view = self._view
        view.rows, view.width, view.positions, view.marks = rows, width, positions, None
        view.index = torch.arange(rows.stop - rows.start, device=positions.device)
        beyond = torch.arange(width, device=positions.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=positions.device)
        mask.masked_fill_(beyond, torch.finfo(dtype).min)
        return Cache(layers=list(self._layers)), positions[:, None], mask[:, None, None]

    def advance(self, rows: slice) -> None:
        """Count the token fed to each of `rows`; without this the next one overwrites it."""
        for row in range(rows.start, rows.stop):
            self._lengths[row] += 1


def _grown(buffer: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    has_rows, heads, capacity, size = buffer.shape
    # Zeros: what is masked is multiplied by 0, and 0 × NaN would be NaN.
    larger = buffer.new_zeros(rows, heads, width, size)
    kept = min(rows, has_rows)
    larger[:kept, :, :capacity] = buffer[:kept]
    return larger


def can_share_rows(config: PreTrainedConfig, parameters: Container[str]) -> bool:
    """Whether a model attends to all tokens in all layers and is told each row's positions."""
    layers = DynamicCache(config=config).layers
    is_plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return is_plain and "position_ids" in parameters and "attention_mask" in parameters
