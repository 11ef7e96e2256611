"""Masks of elements that are dropped at random, and arithmetic under them.

A mask has one bit for each element, 1 where it is kept: those of a row lie in words of 32 bits, the
first element in the lowest. Each bit depends on a seed and its own place only, so that threads
share the work as they like.
"""

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from worker.kernels.numbers import pointer
from worker.kernels.team import OPTIONS, Loop, member, size

LANES: Final = 16
"""Elements that are kept or not by one instruction."""
WORD_BITS = 32
N_NUMBERS_OF_DRAW = 5
_I16, _I64 = ir.IntType(16), ir.IntType(64)


def _kept_of(element: ir.Type) -> Any:
    """Make the function that copies `LANES` elements from one address to another, or zeros.

    The third argument is where their bits are.
    """
    kind = ir.VectorType(element, LANES)

    def kept(context: Any, source: Any, target: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, target, bits = arguments
            value = _load(builder, source, kind)
            chosen = builder.select(_mask(builder, bits), value, ir.Constant(kind, None))
            _store(builder, chosen, target, kind)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 3), generate

    return intrinsic(kept)


def _add_kept(context: Any, source: Any, target: Any, bits: Any) -> Any:
    """Add `LANES` numbers in float32, or zeros, to those at another address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, bits = arguments
        kind = ir.VectorType(ir.FloatType(), LANES)
        added = _load(builder, source, kind)
        chosen = builder.select(_mask(builder, bits), added, ir.Constant(kind, None))
        _store(builder, builder.fadd(_load(builder, target, kind), chosen), target, kind)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 3), generate


def _mask(builder: Any, bits: Any) -> Any:
    word = builder.load(builder.inttoptr(bits, _I16.as_pointer()))
    word.align = 1
    return builder.bitcast(word, ir.VectorType(ir.IntType(1), LANES))


def _load(builder: Any, address: Any, kind: ir.Type) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def _store(builder: Any, value: Any, address: Any, kind: ir.Type) -> None:
    builder.store(value, builder.inttoptr(address, kind.as_pointer())).align = 1


_kept_16, _kept_32, _kept_64 = (_kept_of(ir.IntType(n)) for n in (16, 32, 64))
_added: Any = intrinsic(_add_kept)


@njit(**OPTIONS)
def _turned(x: Any) -> Any:
    return (x >> np.uint64(32)) | (x << np.uint64(32))


@njit(**OPTIONS)
def _random(counter: Any, key: Any) -> Any:
    """Return 32 random bits (Widynski, Squares, arXiv 2004.06278, four rounds)."""
    y = counter * key
    z = y + key
    x = _turned(y * y + y)
    x = _turned(x * x + z)
    x = _turned(x * x + y)
    return (x * x + z) >> np.uint64(32)


@njit(**OPTIONS)
def _key(seed: Any, index: Any) -> Any:
    """Return an odd key of 64 bits that look random (Steele et al., SplitMix64, OOPSLA 2014)."""
    x = seed + (np.uint64(index) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


@njit(**OPTIONS)
def _draw(address: Any) -> None:
    """Draw masks [number, rows, words].

    Args:
        address: Of these numbers: where the masks are; how many; rows; words of a row; the seed.
            Then of each mask how many of 2³² elements are dropped.
    """
    n_masks, n_rows, n_words = carray(address, (N_NUMBERS_OF_DRAW,), np.int64)[1:4]
    numbers = carray(address, (N_NUMBERS_OF_DRAW + n_masks,), np.uint64)
    whole = carray(pointer(np.int64(numbers[0])), (n_masks * n_rows, n_words), np.uint32)
    share = (n_masks * n_rows + size() - 1) // size()
    for row in range(member() * share, min(n_masks * n_rows, (member() + 1) * share)):
        index = row // n_rows
        limit, key = numbers[N_NUMBERS_OF_DRAW + index], _key(numbers[4], index)
        words, first = whole[row], np.uint64((row - index * n_rows) * n_words * WORD_BITS)
        for i in range(n_words):
            word = np.uint64(0)
            for j in range(WORD_BITS):
                is_kept = np.uint64(_random(first + np.uint64(j), key) >= limit)
                word |= is_kept << np.uint64(j)
            words[i] = np.uint32(word)
            first += np.uint64(WORD_BITS)


@njit(**OPTIONS)
def is_kept(row: int, i: int) -> Any:
    """Tell whether element `i` of the row whose mask is there is kept."""
    byte = carray(pointer(row + i // 8), (1,), np.uint8)[0]
    return (byte >> np.uint8(i % 8)) & np.uint8(1)


@njit(**OPTIONS)
def copy_kept(  # noqa: PLR0913 - a loop has its numbers as arguments
    source: int, by_row: int, shape: Any, mask: int, by_mask: int, target: int, by_target: int
) -> None:
    """Copy rows of bfloat16 numbers, and 0 instead of those that are dropped.

    Args:
        source: Where the first row is.
        by_row: How many bytes the next one is further on.
        shape: Rows, and numbers of each.
        mask: Where the mask of the first row's first number is; it begins a byte.
        by_mask: How many bytes that of the next row is further on.
        target: Where they go.
        by_target: How many bytes the next row goes further on.
    """
    n_rows, n = shape
    n_whole = n // LANES * LANES
    for row in range(n_rows):
        own, to, bits = source + row * by_row, target + row * by_target, mask + row * by_mask
        for i in range(0, n_whole, LANES):
            _kept_16(own + 2 * i, to + 2 * i, bits + i // 8)
        given, made = carray(pointer(own), (n,), np.uint16), carray(pointer(to), (n,), np.uint16)
        for i in range(n_whole, n):
            made[i] = given[i] if is_kept(bits, i) else np.uint16(0)


@njit(**OPTIONS)
def add_kept(added: Any, n: int, mask: int, by_mask: int, sums: Any) -> None:
    """Add rows of float32 numbers [rows, width] to `sums`, but for those that are dropped.

    Of each row, `n` have a mask; behind them, whatever is there is added to what nobody reads.
    """
    n_whole = n // LANES * LANES
    for row in range(added.shape[0]):
        own, bits = sums[row], mask + row * by_mask
        source, target = added.ctypes.data + row * added.shape[1] * 4, own.ctypes.data
        for i in range(0, n_whole, LANES):
            _added(source + 4 * i, target + 4 * i, bits + i // 8)
        for i in range(n_whole, n):
            if is_kept(bits, i):
                own[i] += added[row, i]


@njit(**OPTIONS)
def _zero(address: Any, kept: Any, n_bytes: int) -> None:
    """Set to zero what is dropped of x [rows, n].

    Args:
        address: Of these numbers: where x is, contiguous; where its mask is; rows; n.
        kept: The function for elements of its size.
        n_bytes: Their size.
    """
    x, mask, n_rows, n = carray(address, (4,), np.int64)
    by_mask = (n + WORD_BITS - 1) // WORD_BITS * 4
    n_whole = n // LANES * LANES
    share = (n_rows + size() - 1) // size()
    for row in range(member() * share, min(n_rows, (member() + 1) * share)):
        own, bits = x + row * n * n_bytes, mask + row * by_mask
        for i in range(0, n_whole, LANES):
            kept(own + n_bytes * i, own + n_bytes * i, bits + i // 8)
        shape: Any = (n, n_bytes)
        rest = carray(pointer(own), shape, np.uint8)
        for i in range(n_whole, n):
            if not is_kept(bits, i):
                rest[i] = np.uint8(0)


@Loop
def draw(address: Any) -> None:
    _draw(address)


@Loop
def zero_16(address: Any) -> None:
    _zero(address, _kept_16, 2)


@Loop
def zero_32(address: Any) -> None:
    _zero(address, _kept_32, 4)


@Loop
def zero_64(address: Any) -> None:
    _zero(address, _kept_64, 8)
