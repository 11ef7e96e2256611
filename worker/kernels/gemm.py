"""Sums of products of matrices in bfloat16, whose factors lie in memory as PyTorch has them.

A block of columns of the result at a time: what it needs of each right factor is brought into the
order in which `tiles` reads it, in a cache, and used for all rows. Either factor may be read along
its rows or along its columns, so no second copy of a weight is held for the backward pass.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.masks import add_kept, copy_kept
from worker.kernels.numbers import get, pointer, put
from worker.kernels.order import by_columns, by_rows
from worker.kernels.team import OPTIONS, Loop, bits_of, member, size
from worker.kernels.tiles import (
    BLOCK,
    WIDTH,
    tile_of_1,
    tile_of_1_by_1,
    tile_of_1_by_2,
    tile_of_2,
    tile_of_4,
    tile_of_8,
    tile_of_8_by_2,
    tile_of_16_by_1,
)

ROWS = 1024
"""Rows of the result whose sums are made at a time."""
PAIRS = 768
"""Pairs of numbers along the inner dimension that are in order at a time."""
STRIP = 64
"""Rows of a left factor that lies by columns which are in order at a time."""
ONE = bits_of(1.0)
"""The factor of what is multiplied by nothing."""
N_NUMBERS = 12
N_NUMBERS_OF_TERM = 12
_STRIP_AT = PAIRS * BLOCK * WIDTH
_SUMS_AT = _STRIP_AT + PAIRS * STRIP
_PATCH_AT = _SUMS_AT + ROWS * BLOCK * WIDTH
_PRODUCT_AT = _PATCH_AT + PAIRS * BLOCK * WIDTH
_NUMBERS_AT = _PRODUCT_AT + STRIP * BLOCK * WIDTH
SCRATCH_WORDS = _NUMBERS_AT + 2 * (N_NUMBERS + N_NUMBERS_OF_TERM)
"""What each thread needs, in 32 bits."""


@njit(**OPTIONS)
def _multiply(address: Any) -> None:
    """C [rows, columns] = Σ X [rows of X, inner] · W, summed in float32 and rounded once.

    Args:
        address: Of these numbers: where C is, by how many elements its next row is further on, and
            0, or, if C lies by columns, its next column, and 1; 0 if C is bfloat16, 1 if it is
            float32, and 2 if it is that and is added to, by rows; where the bias [columns],
            bfloat16, is, or 0; rows; columns; the number of terms; the number of terms after which
            sums are rounded to bfloat16 before others are added, or 0; how many rows each thread
            has, or 0 if each has own columns; where each thread has `SCRATCH_WORDS`; what the sums
            are multiplied by, the bits of a float64. Then for each term: where X is, and how it
            lies, as is said of C; the same of W [inner, columns]; inner; the first row of C that X
            adds to, and the one after the last; where a mask (`masks`) is, or 0, by how many bytes
            its next row is further on, and 1 if it is of the product [rows of X, columns], or 0 if
            it is of W as it lies.
    """
    numbers = carray(address, (N_NUMBERS,), np.int64)
    n_rows, n_columns = numbers[5:7]
    if numbers[9] != 0:
        first = min(n_rows, member() * numbers[9])
        _share(address, first, min(n_rows, first + numbers[9]), 0, n_columns)
    else:
        n_blocks = (n_columns + BLOCK * WIDTH - 1) // (BLOCK * WIDTH)
        share = (n_blocks + size() - 1) // size() * BLOCK * WIDTH
        first = min(n_columns, member() * share)
        _share(address, 0, n_rows, first, min(n_columns, first + share))


@njit(**OPTIONS)
def _share(
    address: Any, first_row: int, last_row: int, first_column: int, last_column: int
) -> None:
    step = BLOCK * WIDTH
    for row in range(first_row, last_row, ROWS):
        n = min(ROWS, last_row - row)
        for column in range(first_column, last_column, step):
            _block(address, row, n, column, min(step, last_column - column))


@njit(**OPTIONS)
def _block(address: Any, row: int, n: int, column: int, n_columns: int) -> None:
    """Compute `n` rows from `row` on and `n_columns` columns from `column` on."""
    numbers = carray(address, (N_NUMBERS,), np.int64)
    width = (n_columns + WIDTH - 1) // WIDTH * WIDTH
    scratch = numbers[10] + member() * SCRATCH_WORDS * 4
    sums = carray(pointer(scratch + _SUMS_AT * 4), (n, width), np.float32)
    sums[:] = np.float32(0)
    if numbers[4] != 0:
        bias = carray(pointer(numbers[4] + column * 2), (n_columns,), np.uint16)
        for i in range(n):
            own = sums[i]
            for j in range(n_columns):
                own[j] = get(bias, j)
    all_terms = carray(address, (N_NUMBERS + numbers[7] * N_NUMBERS_OF_TERM,), np.int64)
    for number in range(numbers[7]):
        at = N_NUMBERS + number * N_NUMBERS_OF_TERM
        term = all_terms[at : at + N_NUMBERS_OF_TERM]
        start, end = max(row, term[7]), min(row + n, term[8])
        if start < end:
            own = sums[start - row : end - row]
            if term[9] != 0 and term[11] != 0:
                _add_kept_term(term, start - term[7], column, n_columns, own, scratch)
            else:
                _add_term(term, start - term[7], column, n_columns, own, scratch)
        if number + 1 == numbers[8]:
            _round(sums)
    factor = np.float32(carray(address, (N_NUMBERS,), np.float64)[11])
    if factor != np.float32(1):
        sums *= factor
    if numbers[3] == 2:
        _add_to(numbers, sums, row, column, n_columns)
    elif numbers[3] == 1:
        _write(numbers, sums, row, column, n_columns, 4, np.float32)
    else:
        _write(numbers, sums, row, column, n_columns, 2, np.uint16)


@njit(**OPTIONS)
def _round(sums: Any) -> None:
    bits = carray(pointer(sums.ctypes.data), (sums.size,), np.uint32)
    for i in range(bits.size):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        bits[i] = (bits[i] + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)


@njit(**OPTIONS)
def _add_term(term: Any, row: int, column: int, n_columns: int, sums: Any, scratch: int) -> None:
    """Add to `sums` [rows, columns in whole registers] the product of X's rows from `row` on."""
    n_rows, width = sums.shape
    by_x, by_w, n_inner = term[1] * 2, term[4] * 2, term[6]
    x, w = term[0], term[3] + column * 2
    strip = scratch + _STRIP_AT * 4
    is_masked = term[9] != 0 and term[11] == 0
    n_pairs = (n_inner + 1) // 2
    for pair in range(0, n_pairs, PAIRS):
        n = min(PAIRS, n_pairs - pair)
        n_left = n_inner - 2 * pair
        if term[5] == 0:
            start, by = w + 2 * pair * by_w, by_w
            if is_masked:
                shape = (min(2 * n, n_left), n_columns)
                start, by = _kept(term, start, by, shape, 2 * pair, column, scratch)
            by_rows(start, by, n_left, n_columns, n, scratch, width)
        else:
            start, by = w + column * (by_w - 2) + 4 * pair, by_w
            if is_masked:
                shape = (n_columns, min(2 * n, n_left))
                start, by = _kept(term, start, by, shape, column, 2 * pair, scratch)
            by_columns(start, by, n_left, n_columns, n, scratch, width)
        if term[2] == 0 and n_left >= 2 * n:
            start = x + row * by_x + 4 * pair
            _tiles(width // WIDTH, scratch, start, by_x, 4, n, sums.ctypes.data, n_rows)
            continue
        for first in range(0, n_rows, STRIP):
            n_now = min(STRIP, n_rows - first)
            width_now = (n_now + WIDTH - 1) // WIDTH * WIDTH
            if term[2] == 0:
                start = x + (row + first) * by_x + 4 * pair
                by_columns(start, by_x, n_left, n_now, n, strip, width_now)
            else:
                start = x + 2 * pair * by_x + (row + first) * 2
                by_rows(start, by_x, n_left, n_now, n, strip, width_now)
            own = sums.ctypes.data + first * width * 4
            _tiles(width // WIDTH, scratch, strip, 4, width_now * 4, n, own, n_now)


@njit(**OPTIONS)
def _kept(  # noqa: PLR0913
    term: Any, source: int, by_row: int, shape: Any, row: int, column: int, scratch: int
) -> Any:
    """Copy what is kept of a piece of W, as it lies; return where it is, and its rows' distance."""
    target, by_target = scratch + _PATCH_AT * 4, shape[1] * 2
    mask = term[9] + row * term[10] + column // 8
    copy_kept(source, by_row, shape, mask, term[10], target, by_target)
    return target, by_target


@njit(**OPTIONS)
def _add_kept_term(
    term: Any, row: int, column: int, n_columns: int, sums: Any, scratch: int
) -> None:
    """Do what `_add_term` does, but for elements of the product that are dropped."""
    n_rows, width = sums.shape
    place = pointer(scratch + _PRODUCT_AT * 4)
    for first in range(0, n_rows, STRIP):
        n = min(STRIP, n_rows - first)
        product = carray(place, (n, width), np.float32)
        product[:] = np.float32(0)
        _add_term(term, row + first, column, n_columns, product, scratch)
        mask = term[9] + (row + first) * term[10] + column // 8
        add_kept(product, n_columns, mask, term[10], sums[first : first + n])


@njit(**OPTIONS)
def _tiles(  # noqa: PLR0913
    n_wide: int, w: int, x: int, by_row: int, by_pair: int, n_pairs: int, sums: int, n: int
) -> None:
    """Add the products of `n` rows of X with a block of W that is in order."""
    by_sums = n_wide * WIDTH * 4
    row = 0
    if n_wide == 3:
        while n - row >= 8:
            tile_of_8(w, x + row * by_row, by_row, by_pair, n_pairs, sums + row * by_sums)
            row += 8
        if n - row >= 4:
            tile_of_4(w, x + row * by_row, by_row, by_pair, n_pairs, sums + row * by_sums)
            row += 4
        if n - row >= 2:
            tile_of_2(w, x + row * by_row, by_row, by_pair, n_pairs, sums + row * by_sums)
            row += 2
        if n - row >= 1:
            tile_of_1(w, x + row * by_row, by_row, by_pair, n_pairs, sums + row * by_sums)
    elif n_wide == 2:
        while n - row >= 8:
            tile_of_8_by_2(w, x + row * by_row, by_row, by_pair, n_pairs, sums + row * by_sums)
            row += 8
        while n - row >= 1:
            tile_of_1_by_2(w, x + row * by_row, by_row, by_pair, n_pairs, sums + row * by_sums)
            row += 1
    else:
        while n - row >= 16:
            tile_of_16_by_1(w, x + row * by_row, by_row, by_pair, n_pairs, sums + row * by_sums)
            row += 16
        while n - row >= 1:
            tile_of_1_by_1(w, x + row * by_row, by_row, by_pair, n_pairs, sums + row * by_sums)
            row += 1


@njit(**OPTIONS)
def _write(  # noqa: PLR0913
    numbers: Any, sums: Any, row: int, column: int, n_columns: int, n: int, kind: Any
) -> None:
    """Write sums to C, in numbers of `n` bytes."""
    n_rows = sums.shape[0]
    start, by_c = numbers[0], numbers[1] * n
    if numbers[2] == 0:
        for i in range(n_rows):
            place = pointer(start + (row + i) * by_c + column * n)
            target, own = carray(place, (n_columns,), kind), sums[i]
            for j in range(n_columns):
                put(target, j, own[j])
    else:
        for j in range(n_columns):
            place = pointer(start + (column + j) * by_c + row * n)
            target = carray(place, (n_rows,), kind)
            for i in range(n_rows):
                put(target, i, sums[i, j])


@njit(**OPTIONS)
def _add_to(numbers: Any, sums: Any, row: int, column: int, n_columns: int) -> None:
    for i in range(sums.shape[0]):
        place = pointer(numbers[0] + ((row + i) * numbers[1] + column) * 4)
        target, own = carray(place, (n_columns,), np.float32), sums[i]
        for j in range(n_columns):
            target[j] += own[j]


@njit(**OPTIONS)
def _own(scratch: int) -> int:
    return scratch + (member() * SCRATCH_WORDS + _NUMBERS_AT) * 4


@njit(**OPTIONS)
def tell(scratch: int, shape: Any, out: Any, kind: int, factor: int) -> Any:
    """Note one product that this thread is to make; return its term, for `tell_factors`.

    Args:
        scratch: Where each thread has `SCRATCH_WORDS`.
        shape: Rows and columns of C.
        out: Where C is, and how it lies, as `_multiply` is told.
        kind: What it is: 0, 1 or 2.
        factor: What sums are multiplied by, the bits of a float64.
    """
    numbers = carray(pointer(_own(scratch)), (N_NUMBERS + N_NUMBERS_OF_TERM,), np.int64)
    numbers[0], numbers[1], numbers[2] = out
    numbers[3], numbers[4] = kind, 0
    numbers[5], numbers[6] = shape
    numbers[7], numbers[8], numbers[9], numbers[10], numbers[11] = 1, 0, 0, scratch, factor
    return numbers[N_NUMBERS:]


@njit(**OPTIONS)
def tell_factors(term: Any, x: Any, w: Any, n_inner: int, n_rows: int, mask: Any) -> None:
    """Note X and W, and of W's mask where it is, or 0, and how far its next row is."""
    term[0], term[1], term[2] = x
    term[3], term[4], term[5] = w
    term[6], term[7], term[8] = n_inner, 0, n_rows
    term[9], term[10], term[11] = mask[0], mask[1], 0


@njit(**OPTIONS)
def multiply_one(scratch: int, rows: Any, columns: Any) -> None:
    """Make a span of rows and one of columns, which begins with a block, of what was told."""
    address = pointer(_own(scratch))
    _share(address, rows[0], rows[1], columns[0], columns[1])


@Loop
def multiply_sums(address: Any) -> None:
    _multiply(address)
