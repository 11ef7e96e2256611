"""Linear layers in bfloat16 whose weights lie in the order in which `tiles` reads them."""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.numbers import get, pointer, put
from worker.kernels.team import OPTIONS, Loop, member, size
from worker.kernels.tiles import BLOCK, WIDTH, tile_of_1, tile_of_2, tile_of_4, tile_of_8


@njit(**OPTIONS)
def _multiply(address: Any) -> None:
    """y [tokens, out] = x [tokens, in] Wᵀ + b, summed in float32 and rounded once.

    A row's numbers do not depend on how many there are.

    Args:
        address: Of these numbers: where y, x, the blocks of W [blocks, in / 2, `BLOCK`, `WIDTH`, 2]
            and b, or 0, are, bfloat16 each; tokens; in; out; by how many elements the next token of
            y, and of x, is further on.
    """
    numbers = carray(address, (9,), np.int64)
    n_tokens, n_in, n_out, by_y, by_x = numbers[4:9]
    ys = carray(pointer(numbers[0]), (n_tokens * by_y,), np.uint16)
    biases = carray(pointer(numbers[3]), (n_out,), np.uint16)
    width = BLOCK * WIDTH
    n_blocks = (n_out + width - 1) // width
    share = (n_blocks + size() - 1) // size()
    sums = np.empty((8, width), np.float32)
    for block in range(member() * share, min(n_blocks, (member() + 1) * share)):
        first = block * width
        n_columns = min(width, n_out - first)
        weights = numbers[2] + first * n_in * 2
        token = 0
        while token < n_tokens:
            x = numbers[1] + token * by_x * 2
            sums[:] = np.float32(0)
            n = _tile(weights, x, by_x * 2, n_in // 2, sums.ctypes.data, n_tokens - token)
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


@Loop
def multiply_bfloat16(address: Any) -> None:
    _multiply(address)
