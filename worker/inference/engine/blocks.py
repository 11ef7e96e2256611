"""Which prompt prefixes are stored, and where: a chain of hashes, without a tensor in sight.

A prompt is cut into blocks of `block_tokens`. The name of a block is the hash of its tokens and
of the name of the block before, back to a root that stands for the base model and the adapter: the
states of a prefix are those of one model, and under another root the same tokens are not found.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

BASE = "base"
"""Stands in a root where the adapter's digest would; no digest is spelt like it."""


def root_of(fingerprint: str, adapter: str | None) -> bytes:
    """Return the root of the prefixes of one base model, alone or with one adapter."""
    names = (fingerprint, BASE if adapter is None else f"adapter {adapter}")
    # Lengths before the names: no two pairs of names are written alike.
    return hashlib.sha256("".join(f"{len(n)} {n}" for n in names).encode()).digest()


class PrefixBlocks:
    """The blocks of a store of `n_blocks`; the ones used least recently make room for others.

    Args:
        n_blocks: Blocks that the store holds.
        block_tokens: Tokens of a block.
    """

    def __init__(self, n_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # name to place, oldest first
        self._free = list(range(n_blocks))
        self._n_blocks = n_blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, root: bytes, tokens: Sequence[int]) -> list[int]:
        """Return the places of the longest stored prefix of `tokens`, whole blocks, in order."""
        found = []
        for name in self._names(root, tokens):
            if name not in self._blocks:
                break
            found.append(name)
        self._touch(found)
        return [self._blocks[name] for name in found]

    def store(self, root: bytes, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Give every whole block of `tokens` a place, as far as the store goes.

        Returns:
            The blocks that have yet to be written, as (number in the prompt, place).
        """
        names = list(self._names(root, tokens))[: self._n_blocks]
        # First those that are here: they must not make room for their own continuation.
        self._touch([name for name in names if name in self._blocks])
        new = []
        for number, name in enumerate(names):
            if name not in self._blocks:
                place = self._free.pop() if self._free else self._blocks.popitem(last=False)[1]
                self._blocks[name] = place
                new.append((number, place))
        self._touch(names)
        return new

    def _names(self, root: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
        name = root
        for start in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            block = tokens[start : start + self.block_tokens]
            text = b"".join(token.to_bytes(4, "little") for token in block)
            name = hashlib.sha256(name + text).digest()
            yield name

    def _touch(self, names: Sequence[bytes]) -> None:
        # From the last one back, so that no block outlives the one before it: what is found of a
        # prompt is always its beginning.
        for name in reversed(names):
            self._blocks.move_to_end(name)
