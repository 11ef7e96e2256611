"""What adapters of low rank add to the outputs of linear layers."""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.numbers import (
    add,
    add_to_two,
    copy,
    pointer,
    product,
    products_of_four,
)
from worker.kernels.team import OPTIONS, Loop, member, size

TOKENS = 48
"""Tokens, at most, for which the matrices of an adapter are widened once."""


@njit(**OPTIONS)
def _add_low_rank(address: Any, kind: Any) -> None:
    """y [rows, tokens, out] += x [rows, tokens, in] Aᵀ Bᵀ of each row's own; of parts with one x.

    Args:
        address: Of these numbers: where x is; in; rows; tokens; where it is told where the matrices
            of the first row are, for each module A [r, in], Bᵀ [r, out] and r, which is 0 for
            nothing; by how many numbers that of the next row is further on; parts; and of each part
            where y is, by how many elements its next token is further on, out, and which module it
            is.
        kind: Of all elements: uint16, which is bfloat16, or float32.
    """
    numbers = carray(address, (23,), np.int64)
    n_in, n_rows, n_tokens, stride = numbers[1], numbers[2], numbers[3], numbers[5]
    n_blocks = max((n_tokens + TOKENS - 1) // TOKENS, min(n_tokens, size() // n_rows))
    n_each = (n_tokens + n_blocks - 1) // n_blocks
    all_x = carray(pointer(numbers[0]), (n_rows * n_tokens, n_in), kind)
    x = np.zeros((n_each + 3, n_in), np.float32)  # the last ones are nobody's
    for task in range(member(), n_rows * n_blocks, size()):
        row, first = task // n_blocks, (task % n_blocks) * n_each
        n = min(n_each, n_tokens - first)
        if n <= 0:
            continue
        for token in range(n):
            copy(all_x[row * n_tokens + first + token], x[token])
        places = numbers[4] + row * stride * 8
        for part in range(numbers[6]):
            y, by_token, n_out, module = numbers[7 + 4 * part : 11 + 4 * part]
            place = carray(pointer(places + module * 24), (3,), np.int64)
            if place[2] > 0:
                a = carray(pointer(place[0]), (place[2], n_in), kind)
                b = carray(pointer(place[1]), (place[2], n_out), kind)
                all_y = carray(pointer(y), (n_rows * n_tokens * by_token,), kind)
                at = (row * n_tokens + first) * by_token
                _add_to_part(all_y[at:], by_token, x[: n + 3], a, b)


@njit(**OPTIONS)
def _add_to_part(y: Any, by_token: int, x: Any, a: Any, b: Any) -> None:
    """Add `x` [tokens and three more, in] times A, times B, to the tokens that `y` begins with."""
    n_tokens, rank, n_in, n_out = x.shape[0] - 3, a.shape[0], a.shape[1], b.shape[1]
    sums = np.empty((4, n_out), np.float32)
    if n_tokens == 1:
        copy(y[:n_out], sums[0])
        for r in range(rank):
            add(sums[0], b[r], product(x[0], a[r]))
        copy(sums[0], y[:n_out])
        return
    rounded = (rank + 3) // 4 * 4
    a32 = np.zeros((rounded, n_in), np.float32)
    b32 = np.zeros((rounded, n_out), np.float32)
    h = np.empty((4, rounded), np.float32)
    for r in range(rank):
        copy(a[r], a32[r])
        copy(b[r], b32[r])
    for token in range(0, n_tokens, 4):
        n = min(4, n_tokens - token)
        for i in range(n):
            at = (token + i) * by_token
            copy(y[at : at + n_out], sums[i])
        for r in range(0, rounded, 4):
            products_of_four(x[token : token + 4], a32, r, h)
        for r in range(0, rounded, 4):
            add_to_two(sums[0], sums[1], b32, r, h)
        if n > 2:
            for r in range(0, rounded, 4):
                add_to_two(sums[2], sums[3], b32, r, h[2:])
        for i in range(n):
            at = (token + i) * by_token
            copy(sums[i], y[at : at + n_out])


@Loop
def add_low_rank_bfloat16(address: Any) -> None:
    _add_low_rank(address, np.uint16)


@Loop
def add_low_rank_float32(address: Any) -> None:
    _add_low_rank(address, np.float32)
