"""The key-value caches of models that attend to all tokens in all layers: in and out of rows."""

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer, [rows, heads, tokens, head size] each."""


def states_of(cache: Cache) -> list[States]:
    """Return what is in a cache, layer by layer.

    Raises:
        TypeError: a layer is of another kind, or nothing was put into it yet.
    """
    found = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise TypeError(f"A cache has a layer {type(layer).__name__} without plain states.")
        found.append((layer.keys, layer.values))
    return found


def joined(caches: Sequence[Cache], config: PreTrainedConfig) -> DynamicCache:
    """Return one cache with the rows of `caches`, which are equally long."""
    cache = DynamicCache(config=config)
    for number, layers in enumerate(zip(*map(states_of, caches), strict=True)):
        keys, values = (torch.cat(states) for states in zip(*layers, strict=True))
        cache.update(keys, values, number)
    return cache


def row_of(cache: Cache, row: int, length: int, config: PreTrainedConfig) -> DynamicCache:
    """Return a copy of the first `length` tokens of a row."""
    own = DynamicCache(config=config)
    for number, layer in enumerate(states_of(cache)):
        keys, values = (states[row : row + 1, :, :length] for states in layer)
        own.update(keys, values, number)
    return own
