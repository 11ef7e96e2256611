"""The key-value cache of the sequences that decode together: one row each, side by side."""

from collections.abc import Container

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

GROWTH = 256
"""Tokens by which rows grow at once: growing copies all rows."""


class _View:
    """The rows that the next forward pass feeds, one token each; `width` includes that token."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.index = torch.empty(0, dtype=torch.long)
        self.positions = torch.empty(0, dtype=torch.long)
        self.width = 0


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
        assert self.keys is not None
        assert self.values is not None
        self.keys[view.index, :, view.positions] = key_states[:, :, 0]
        self.values[view.index, :, view.positions] = value_states[:, :, 0]
        return self.keys[view.rows, :, : view.width], self.values[view.rows, :, : view.width]

    def get_seq_length(self) -> int:
        return self._view.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._view.width, 0

    def get_max_length(self) -> int:
        return -1


class RowCache:
    """Rows 0, 1, …, each the cache of one sequence; the last row moves into a gap."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._view = _View()
        self._layers: list[_RowLayer] = []

    def __len__(self) -> int:
        return len(self._lengths)

    @torch.inference_mode()
    def append(self, cache: DynamicCache) -> None:
        """Copy the cache of a sequence (batch size 1) into a new last row."""
        row, length = len(self), cache.get_seq_length()
        for index, layer in enumerate(cache.layers):
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            if row == 0:
                self._layers.append(
                    _RowLayer(self._view, layer.keys[:, :, :0], layer.values[:, :, :0])
                )
            mine = self._layers[index]
            for name in ("keys", "values"):
                buffer = _grown(getattr(mine, name), row + 1, length)
                buffer[row, :, :length] = getattr(layer, name)[0]
                setattr(mine, name, buffer)
        self._lengths.append(length)

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """Forget `row`; the last row takes its place. Without rows no memory is kept."""
        last = len(self) - 1
        length = self._lengths[last]
        for layer in self._layers:
            for buffer in (layer.keys, layer.values):
                assert buffer is not None
                buffer[row, :, :length] = buffer[last, :, :length]
        self._lengths[row] = length
        self._lengths.pop()
        if not self._lengths:
            self._layers = []

    @torch.inference_mode()
    def feed(self, rows: slice, dtype: torch.dtype) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """Make room for one more token in each of `rows`, to be fed in one forward pass.

        Returns:
            The cache for the model, the new tokens' positions [n, 1], and what to add to the
            attention scores [n, 1, 1, width]: the lowest number past the end of a row, else 0.
        """
        lengths = self._lengths[rows]
        width = max(lengths) + 1
        for layer in self._layers:
            layer.keys = _grown(layer.keys, len(self), width)
            layer.values = _grown(layer.values, len(self), width)
        device = self._layers[0].keys.device  # type: ignore[union-attr]
        view = self._view
        view.rows, view.width = rows, width
        view.index = torch.arange(rows.start, rows.stop, device=device)
        view.positions = torch.tensor(lengths, device=device)
        beyond = torch.arange(width, device=device) > view.positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=device)
        mask.masked_fill_(beyond, torch.finfo(dtype).min)
        return Cache(layers=list(self._layers)), view.positions[:, None], mask[:, None, None]

    def advance(self, rows: slice) -> None:
        """Count the token fed to each of `rows`; without this the next one overwrites it."""
        for row in range(rows.start, rows.stop):
            self._lengths[row] += 1


def _grown(buffer: torch.Tensor | None, rows: int, width: int) -> torch.Tensor:
    """Return `buffer`, or a larger copy where it has fewer than `rows` rows or `width` tokens."""
    assert buffer is not None
    has_rows, heads, capacity, size = buffer.shape
    if has_rows >= rows and capacity >= width:
        return buffer
    if width > capacity:
        capacity = -(-width // GROWTH) * GROWTH
    # Zeros: what is masked is multiplied by 0, and 0 × NaN would be NaN.
    larger = buffer.new_zeros(max(rows, has_rows), heads, capacity, size)
    larger[:has_rows, :, : buffer.shape[2]] = buffer
    return larger


def can_share_rows(config: PreTrainedConfig, parameters: Container[str]) -> bool:
    """Whether a model attends to all tokens in all layers and is told each row's positions."""
    layers = DynamicCache(config=config).layers
    is_plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return is_plain and "position_ids" in parameters and "attention_mask" in parameters
