"""Matrices in bfloat16 brought into the order in which `tiles` reads the right one of a product.

Pairs of numbers along the inner dimension are words of 32 bits: those of some columns of the result
lie side by side, and behind them those of the next pair.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.numbers import pointer, put
from worker.kernels.team import OPTIONS, Loop
from worker.kernels.tiles import (
    WIDTH,
    transpose_8_to_3,
    transpose_to_1,
    transpose_to_2,
    transpose_to_3,
)

N_NUMBERS = 9


@njit(**OPTIONS)
def by_columns(  # noqa: PLR0913 - a loop has its numbers as arguments
    source: int, by_row: int, n_left: int, n_rows: int, n_pairs: int, target: int, width: int
) -> None:
    """Bring W [columns, inner] into order: pairs of numbers of neighbouring rows beside each other.

    Args:
        source: Where the first of `n_rows` rows is.
        by_row: How many bytes the next one is further on.
        n_left: How many numbers of a row there are.
        n_rows: At most `width`.
        n_pairs: How many pairs of each are wanted; behind the last number comes 0.
        target: Where they go, [n_pairs, width, 2]; other rows are 0.
        width: A multiple of `WIDTH`.
    """
    n_given = min(n_pairs, n_left // 2)
    n_whole, n_pairs_whole = n_rows // WIDTH * WIDTH, n_given // WIDTH * WIDTH
    if width > 3 * WIDTH:
        n_whole = 0
    # Rank 16 has 8 pairs.
    ends_in_8 = width == 3 * WIDTH and n_given - n_pairs_whole >= WIDTH // 2
    for row in range(0, n_whole, WIDTH):
        for at in range(0, n_pairs_whole, WIDTH):
            place = target + (at * width + row) * 4
            if width == 3 * WIDTH:
                transpose_to_3(source + row * by_row + at * 4, by_row, place)
            elif width == 2 * WIDTH:
                transpose_to_2(source + row * by_row + at * 4, by_row, place)
            else:
                transpose_to_1(source + row * by_row + at * 4, by_row, place)
        if ends_in_8:
            place = target + (n_pairs_whole * width + row) * 4
            transpose_8_to_3(source + row * by_row + n_pairs_whole * 4, by_row, place)
    if ends_in_8:
        n_pairs_whole += WIDTH // 2
    words = carray(pointer(target), (n_pairs, width), np.uint32)
    for row in range(n_rows):
        own = carray(pointer(source + row * by_row), (n_given,), np.uint32)
        for at in range(n_pairs_whole if row < n_whole else 0, n_given):
            words[at, row] = own[at]
        if n_given < n_pairs:
            last = carray(pointer(source + row * by_row + n_given * 4), (1,), np.uint16)
            words[n_given, row] = np.uint32(last[0])
    if n_rows < width:
        for at in range(n_pairs):
            words[at, n_rows:] = np.uint32(0)


@njit(**OPTIONS)
def by_rows(  # noqa: PLR0913
    source: int, by_row: int, n_left: int, n_columns: int, n_pairs: int, target: int, width: int
) -> None:
    """Bring W [inner, columns] into order: each number of a row beside that of the next.

    Args:
        source: Where the first row is.
        by_row: How many bytes the next one is further on.
        n_left: How many rows there are; after the last that is left come 0.
        n_columns: At most `width`.
        n_pairs: How many pairs of rows are wanted.
        target: Where they go, [n_pairs, width, 2]; other columns are 0.
        width: A multiple of `WIDTH`.
    """
    words = carray(pointer(target), (n_pairs, width), np.uint32)
    for at in range(n_pairs):
        word = words[at]
        low = carray(pointer(source + 2 * at * by_row), (n_columns,), np.uint16)
        if 2 * at + 1 < n_left:
            high = carray(pointer(source + (2 * at + 1) * by_row), (n_columns,), np.uint16)
            for j in range(n_columns):
                word[j] = np.uint32(low[j]) | (np.uint32(high[j]) << np.uint32(16))
        else:
            for j in range(n_columns):
                word[j] = np.uint32(low[j])
        word[n_columns:] = np.uint32(0)


@njit(**OPTIONS)
def _narrow(source: int, scale: Any, target: Any) -> None:
    """Set the bfloat16 numbers `target` to `scale` times those in float32 at `source`."""
    numbers = carray(pointer(source), target.shape, np.float32)
    for i in range(target.shape[0]):
        put(target, i, scale * numbers[i])


@njit(**OPTIONS)
def _order(address: Any) -> None:
    """Bring matrices [columns, inner] into order, in blocks of `width` columns each.

    Args:
        address: Of the number of matrices, and of these of each: where it is; by how many elements
            the next column is further on, and 0, or, if the numbers of a row are neighbours, the
            next along the inner dimension, and 1; 1 if it is float32 and 0 if it is bfloat16;
            columns; inner; width, a multiple of `WIDTH` up to 3 of them; what its numbers are
            multiplied by if they are float32, the bits of a float64; where [blocks, inner / 2,
            width, 2] go.
    """
    n = carray(address, (1,), np.int64)[0]
    numbers = carray(address, (1 + n * N_NUMBERS,), np.int64)
    factors = carray(address, (1 + n * N_NUMBERS,), np.float64)
    longest = 0
    for index in range(n):
        longest = max(longest, numbers[1 + index * N_NUMBERS + 5])
    narrow = np.empty(3 * WIDTH * longest, np.uint16)
    for index in range(n):
        at = 1 + index * N_NUMBERS
        source, by, across, is_wide, n_columns, n_inner, width, _, target = numbers[at : at + 9]
        scale = np.float32(factors[at + 7])
        n_pairs = (n_inner + 1) // 2
        for first in range(0, n_columns, width):
            n_now = min(width, n_columns - first)
            place = target + first * n_pairs * 4
            start, by_now = source + first * (1 if across else by) * 2, by * 2
            if is_wide != 0:
                start = source + first * (1 if across else by) * 4
                n_rows, n_each = (n_inner, n_now) if across else (n_now, n_inner)
                by_now = n_each * 2
                if by == n_each:  # to begin a row takes as long as a short one
                    n_rows, n_each = 1, n_rows * n_each
                for row in range(n_rows):
                    own = narrow[row * n_each : (row + 1) * n_each]
                    _narrow(start + row * by * 4, scale, own)
                start = narrow.ctypes.data
            if across != 0:
                by_rows(start, by_now, n_inner, n_now, n_pairs, place, width)
            else:
                by_columns(start, by_now, n_inner, n_now, n_pairs, place, width)


@Loop
def order(address: Any) -> None:
    _order(address)
