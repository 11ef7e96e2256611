"""Keys and values of prompt prefixes, block by block; copied into the cache that continues them.

A block is copied, never shared: sequences own their caches, so that nothing that a sequence does
can change a stored prefix.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from worker.inference.engine.blocks import PrefixBlocks
from worker.inference.engine.caches import states_of

BLOCK_TOKENS = 8
"""Few, so that a short prompt too gains by what it shares, such as a template's system message."""


class PrefixStore:
    """At most `n_tokens` tokens of prefixes; their tensors are made with the first prompt."""

    def __init__(self, n_tokens: int) -> None:
        self._n_blocks = n_tokens // BLOCK_TOKENS
        self._blocks = PrefixBlocks(self._n_blocks, BLOCK_TOKENS)
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def n_stored(self, root: bytes, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` `load` would fill a cache with."""
        return len(self._blocks.match(root, tokens[:-1])) * BLOCK_TOKENS

    @torch.inference_mode()
    def load(self, root: bytes, tokens: Sequence[int], cache: DynamicCache) -> int:
        """Fill the empty `cache` with what is stored of `tokens`; return how many tokens that is.

        It is never all of them: the last token has to be fed to get the next.
        """
        places = self._blocks.match(root, tokens[:-1])
        if not places:
            return 0
        index = torch.tensor(places, device=self._layers[0][0].device)
        for number, stored in enumerate(self._layers):
            keys, values = (_joined(blocks.index_select(0, index)) for blocks in stored)
            cache.update(keys, values, number)
        return len(places) * BLOCK_TOKENS

    @torch.inference_mode()
    def save(self, root: bytes, tokens: Sequence[int], cache: DynamicCache) -> None:
        """Store the prefix `tokens` whose states are in `cache`, as far as whole blocks go."""
        new = self._blocks.store(root, tokens)
        if not new:
            return
        layers = states_of(cache)
        if not self._layers:
            self._layers = [(self._empty(keys), self._empty(values)) for keys, values in layers]
        # What is stored of a prompt is always its beginning, so that what is new is one stretch.
        first, last = new[0][0], new[-1][0] + 1
        places = torch.tensor([place for _, place in new], device=self._layers[0][0].device)
        span = slice(first * BLOCK_TOKENS, last * BLOCK_TOKENS)
        for layer, stored in zip(layers, self._layers, strict=True):
            for states, blocks in zip(layer, stored, strict=True):
                heads, _, size = states[0].shape
                cut = states[0, :, span].view(heads, last - first, BLOCK_TOKENS, size)
                blocks[places] = cut.transpose(0, 1)

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, size = states.shape
        return states.new_empty(self._n_blocks, heads, BLOCK_TOKENS, size)


def _joined(blocks: torch.Tensor) -> torch.Tensor:
    """Turn [blocks, heads, tokens, size] into [1, heads, blocks · tokens, size]."""
    n_blocks, heads, n_tokens, size = blocks.shape
    return blocks.transpose(0, 1).reshape(1, heads, n_blocks * n_tokens, size)
