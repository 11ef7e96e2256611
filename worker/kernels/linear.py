"""Linear layers in bfloat16 whose weights lie in the order in which `tiles` reads them.

What the adapter of a row adds goes into the same sums, so that it costs no way through memory and
no loop of its own.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.numbers import get, pointer, put
from worker.kernels.team import OPTIONS, Loop, member, size
from worker.kernels.tiles import (
    BLOCK,
    WIDTH,
    narrow_tile_of_1,
    narrow_tile_of_2,
    narrow_tile_of_4,
    prefetch,
    tile_of_1,
    tile_of_2,
    tile_of_4,
    tile_of_8,
)

MOST_PARTS = 8
"""Modules that one product can be of."""
_COLUMNS = BLOCK * WIDTH
_BY_ROW = _COLUMNS * 4
"""Bytes from a row's sums to the next one's."""
_BY_PAIR = _COLUMNS * 4
"""Bytes from what is multiplied with a pair of numbers to the next."""


@njit(**OPTIONS)
def _multiply(address: Any) -> None:
    """y [tokens, out] = x [tokens, in] Wᵀ + b, or y itself, and x Aᵀ Bᵀ of each row's own A and B.

    Summed in float32 and rounded once; x Aᵀ is rounded as well. A row's numbers do not depend on
    how many there are, nor on what others have for adapters.

    Args:
        address: Of these numbers: where y, x, the blocks of W [blocks, in / 2, `BLOCK`, `WIDTH`, 2]
            and b are, bfloat16 each, and 0 where there is no W or no b; tokens; in; out; by how
            many elements the next token of y, and of x, is further on. Then: where it is told of
            the first row, for each module, where A [groups, in / 2, `WIDTH`, 2] and B [blocks, r /
            2, `BLOCK`, `WIDTH`, 2] are, and r, which is 0 for nothing; by how many numbers that of
            the next row is further on; rows; parts, at most `MOST_PARTS`; and of each part its
            first block, its last one's next, and its module.
    """
    numbers = carray(address, (13 + 3 * MOST_PARTS,), np.int64)
    n_tokens, n_in, n_out, by_y, by_x = numbers[4:9]
    n_parts = numbers[12]
    ys = carray(pointer(numbers[0]), (n_tokens * by_y,), np.uint16)
    biases = carray(pointer(numbers[3]), (n_out,), np.uint16)
    n_blocks = (n_out + _COLUMNS - 1) // _COLUMNS
    share = (n_blocks + size() - 1) // size()
    mine = (member() * share, min(n_blocks, (member() + 1) * share))
    widths, starts, n_hidden = _measure(numbers, mine)
    hidden = np.empty(max(n_hidden, 1), np.uint16)
    for part in range(n_parts):
        if widths[part] > 0:
            _project(numbers, part, widths[part], hidden[starts[part] :])
    sums = np.empty((8, _COLUMNS), np.float32)
    for block in range(mine[0], mine[1]):
        first = block * _COLUMNS
        n_columns = min(_COLUMNS, n_out - first)
        for part in range(n_parts):
            if widths[part] > 0 and numbers[13 + 3 * part] <= block < numbers[14 + 3 * part]:
                _fetch(numbers, part, block)
        token = 0
        while token < n_tokens:
            at_sums = sums.ctypes.data
            if numbers[2] != 0:
                sums[:] = np.float32(0)
                weights = numbers[2] + first * n_in * 2
                x = numbers[1] + token * by_x * 2
                n = _tile(weights, x, by_x * 2, n_in // 2, at_sums, n_tokens - token)
            else:
                n = min(8, n_tokens - token)
                for row in range(n):
                    at = (token + row) * by_y + first
                    y, own = ys[at : at + n_columns], sums[row]
                    for i in range(n_columns):
                        own[i] = get(y, i)
            for part in range(n_parts):
                width = widths[part]
                if width > 0 and numbers[13 + 3 * part] <= block < numbers[14 + 3 * part]:
                    at_hidden = hidden.ctypes.data + starts[part] * 2
                    _add(numbers, part, block, (token, n), (at_hidden, width * 2), at_sums)
            for row in range(n):
                at = (token + row) * by_y + first
                y, own = ys[at : at + n_columns], sums[row]
                if numbers[3] != 0:
                    bias = biases[first : first + n_columns]
                    for i in range(n_columns):
                        own[i] += get(bias, i)
                for i in range(n_columns):
                    put(y, i, own[i])
            token += n


@njit(**OPTIONS)
def _place(numbers: Any, part: int, row: int) -> Any:
    """Return where A and B of a row are for a part, and r."""
    at = numbers[9] + (row * numbers[10] + 3 * numbers[15 + 3 * part]) * 8
    return carray(pointer(at), (3,), np.int64)


@njit(**OPTIONS)
def _measure(numbers: Any, mine: Any) -> Any:
    """Return the largest rank of each part of which a block is `mine`, in whole groups; where
    its numbers begin among those of all; and how many there are.
    """
    widths, starts = np.zeros(MOST_PARTS, np.int64), np.zeros(MOST_PARTS, np.int64)
    n = 0
    for part in range(numbers[12]):
        first, last = numbers[13 + 3 * part], numbers[14 + 3 * part]
        if first < mine[1] and mine[0] < last:
            for row in range(numbers[11]):
                rank = _place(numbers, part, row)[2]
                widths[part] = max(widths[part], (rank + WIDTH - 1) // WIDTH * WIDTH)
        starts[part] = n
        n += numbers[4] * widths[part]
    return widths, starts, n


@njit(**OPTIONS)
def _project(numbers: Any, part: int, width: int, hidden: Any) -> None:
    """Set `hidden` [tokens, width] to x Aᵀ of each row's own A, where it has one."""
    n_tokens, n_in, by_x = numbers[4], numbers[5], numbers[8]
    n_each = n_tokens // numbers[11]
    sums = np.empty((4, WIDTH), np.float32)
    for row in range(numbers[11]):
        place = _place(numbers, part, row)
        for group in range((place[2] + WIDTH - 1) // WIDTH):
            a = place[0] + group * WIDTH * n_in * 2
            token = row * n_each
            while token < (row + 1) * n_each:
                sums[:] = np.float32(0)
                x, left = numbers[1] + token * by_x * 2, (row + 1) * n_each - token
                n = _narrow_tile(a, x, by_x * 2, n_in // 2, sums.ctypes.data, left)
                for i in range(n):
                    at = (token + i) * width + group * WIDTH
                    target = hidden[at : at + WIDTH]
                    for column in range(WIDTH):
                        put(target, column, sums[i, column])
                token += n


@njit(**OPTIONS)
def _fetch(numbers: Any, part: int, block: int) -> None:
    """Have a block of each row's B on its way while the base's product is made."""
    for row in range(numbers[11]):
        place = _place(numbers, part, row)
        n_bytes = (place[2] + 1) // 2 * _BY_PAIR
        b = place[1] + (block - numbers[13 + 3 * part]) * n_bytes
        for at in range(0, n_bytes, 64):
            prefetch(b + at)


@njit(**OPTIONS)
def _add(numbers: Any, part: int, block: int, tokens: Any, hidden: Any, sums: int) -> None:
    """Add to the sums of `tokens`, the first and how many, what their rows' B make of `hidden`,
    which is told by its address and how many bytes the next token's is further on.
    """
    first, n = tokens
    at_hidden, by_hidden = hidden
    n_each = numbers[4] // numbers[11]
    done = 0
    while done < n:
        row = (first + done) // n_each
        end = min(n, (row + 1) * n_each - first)
        place = _place(numbers, part, row)
        n_pairs = (place[2] + 1) // 2
        if n_pairs > 0:
            b = place[1] + (block - numbers[13 + 3 * part]) * n_pairs * _BY_PAIR
            while done < end:
                h = at_hidden + (first + done) * by_hidden
                done += _tile(b, h, by_hidden, n_pairs, sums + done * _BY_ROW, end - done)
        done = end


@njit(**OPTIONS)
def _tile(weights: int, x: int, by_row: int, n_pairs: int, sums: int, n_left: int) -> int:
    """Sum up as many rows as a tile has of those that are left, and return how many."""
    if n_left >= 8:
        tile_of_8(weights, x, by_row, 4, n_pairs, sums)
        return 8
    if n_left >= 4:
        tile_of_4(weights, x, by_row, 4, n_pairs, sums)
        return 4
    if n_left >= 2:
        tile_of_2(weights, x, by_row, 4, n_pairs, sums)
        return 2
    tile_of_1(weights, x, by_row, 4, n_pairs, sums)
    return 1


@njit(**OPTIONS)
def _narrow_tile(weights: int, x: int, by_row: int, n_pairs: int, sums: int, n_left: int) -> int:
    """The same, of one register of columns."""
    if n_left >= 4:
        narrow_tile_of_4(weights, x, by_row, n_pairs, sums)
        return 4
    if n_left >= 2:
        narrow_tile_of_2(weights, x, by_row, n_pairs, sums)
        return 2
    narrow_tile_of_1(weights, x, by_row, n_pairs, sums)
    return 1


@Loop
def multiply_bfloat16(address: Any) -> None:
    _multiply(address)
