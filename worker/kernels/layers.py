"""What stands between the products of a Transformer layer."""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.numbers import copy, exp, get, largest_of, pointer, put
from worker.kernels.team import OPTIONS, Loop, member, size

STRETCH = 1024
"""Numbers whose largest is found at a time."""


@njit(**OPTIONS)
def _rescale(address: Any, kind: Any) -> None:
    """y [tokens, d] = w · x / sqrt(mean x² + ε), the quotient rounded before w (RMSNorm).

    Args:
        address: Of these numbers: where y, x and w are; tokens; d; ε in float64; where one over the
            root of each token is to be put, in float32, or 0.
        kind: As in `_add_low_rank`.
    """
    numbers = carray(address, (7,), np.int64)
    epsilon = carray(address, (6,), np.float64)[5]
    y, x, w, n_tokens, d = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    factors = carray(pointer(numbers[6]), (n_tokens,), np.float32)
    ys = carray(pointer(y), (n_tokens, d), kind)
    xs = carray(pointer(x), (n_tokens, d), kind)
    weight = carray(pointer(w), (d,), kind)
    share = (n_tokens + size() - 1) // size()
    for token in range(member() * share, min(n_tokens, (member() + 1) * share)):
        factor = _rescale_token(xs[token], weight, ys[token], epsilon)
        if numbers[6] != 0:
            factors[token] = factor


@njit(**OPTIONS)
def _rescale_token(x: Any, weight: Any, y: Any, epsilon: float) -> Any:
    squares = np.float32(0)
    for i in range(x.shape[0]):
        value = get(x, i)
        squares += value * value
    mean = squares / np.float32(x.shape[0])
    factor = np.float32(1) / np.sqrt(mean + np.float32(epsilon))
    for i in range(x.shape[0]):
        put(y, i, get(x, i) * factor)
    for i in range(x.shape[0]):
        put(y, i, get(y, i) * get(weight, i))
    return factor


@njit(**OPTIONS)
def _add_and_rescale(address: Any, kind: Any) -> None:
    """s = x + z, rounded, and y as `_rescale` makes it of s; [tokens, d] each.

    Args:
        address: Of these numbers: where y, s, x, z and w are; tokens; d; ε in float64; where one
            over the root of each token is to be put, in float32, or 0.
        kind: As in `_add_low_rank`.
    """
    numbers = carray(address, (9,), np.int64)
    epsilon = carray(address, (8,), np.float64)[7]
    n_tokens, d = numbers[5], numbers[6]
    factors = carray(pointer(numbers[8]), (n_tokens,), np.float32)
    ys = carray(pointer(numbers[0]), (n_tokens, d), kind)
    sums = carray(pointer(numbers[1]), (n_tokens, d), kind)
    xs = carray(pointer(numbers[2]), (n_tokens, d), kind)
    zs = carray(pointer(numbers[3]), (n_tokens, d), kind)
    weight = carray(pointer(numbers[4]), (d,), kind)
    share = (n_tokens + size() - 1) // size()
    for token in range(member() * share, min(n_tokens, (member() + 1) * share)):
        _sum(xs[token], zs[token], sums[token])
        factor = _rescale_token(sums[token], weight, ys[token], epsilon)
        if numbers[8] != 0:
            factors[token] = factor


@njit(**OPTIONS)
def _sum(x: Any, z: Any, total: Any) -> None:
    for i in range(x.shape[0]):
        put(total, i, get(x, i) + get(z, i))


@njit(**OPTIONS)
def _gate(address: Any, kind: Any) -> None:
    """y [tokens, d] = silu(g) · u (SwiGLU, arXiv 2002.05202, eq. 6).

    Args:
        address: Of these numbers: where y, g and u are; tokens; d; by how many elements the next
            token of g, and of u, is further on.
        kind: As in `_add_low_rank`.
    """
    numbers = carray(address, (7,), np.int64)
    n_tokens, d, by_gate, by_value = numbers[3:7]
    ys = carray(pointer(numbers[0]), (n_tokens, d), kind)
    gates = carray(pointer(numbers[1]), (n_tokens * by_gate,), kind)
    values = carray(pointer(numbers[2]), (n_tokens * by_value,), kind)
    share = (n_tokens + size() - 1) // size()
    for token in range(member() * share, min(n_tokens, (member() + 1) * share)):
        gate, value = token * by_gate, token * by_value
        _gate_token(gates[gate : gate + d], values[value : value + d], ys[token])


@njit(**OPTIONS)
def _gate_token(gate: Any, value: Any, y: Any) -> None:
    for i in range(gate.shape[0]):
        x = get(gate, i)
        power = exp(-abs(x))
        share = np.float32(1) if x >= np.float32(0) else power
        put(y, i, x * share / (np.float32(1) + power) * get(value, i))


@njit(**OPTIONS)
def _rotate(address: Any, kind: Any) -> None:
    """Positions in queries and keys (RoPE, arXiv 2104.09864, eq. 34, halves for pairs), and all
    heads apart: from [rows, tokens, heads · d] to [rows, heads, tokens, d].

    Args:
        address: Of these numbers: where the new queries, keys and values are, and the old; by how
            many elements the next token of these three is further on; where cosines and sines
            [rows, tokens, d] are; by how many elements those of the next row are further on; rows;
            tokens; heads of queries; of keys; d.
        kind: As in `_add_low_rank`.
    """
    numbers = carray(address, (17,), np.int64)
    by_row, n_rows, n_tokens, n_heads, n_shared, d = numbers[11:17]
    cosines = carray(pointer(numbers[9]), (n_rows * n_tokens * d,), kind)
    sines = carray(pointer(numbers[10]), (n_rows * n_tokens * d,), kind)
    n_all = n_heads + 2 * n_shared
    for task in range(member(), n_rows * n_all, size()):
        row, head = task // n_all, task % n_all
        part = (head >= n_heads) + (head >= n_heads + n_shared)
        n_own = n_heads if part == 0 else n_shared
        head -= (0, n_heads, n_heads + n_shared)[part]
        by_token = numbers[6 + part]
        old = carray(pointer(numbers[3 + part]), (n_rows * n_tokens * by_token,), kind)
        new = carray(pointer(numbers[part]), (n_rows * n_own, n_tokens, d), kind)[
            row * n_own + head
        ]
        for token in range(n_tokens):
            at = (row * n_tokens + token) * by_token + head * d
            x = old[at : at + d]
            if part == 2:
                copy(x, new[token])
            else:
                at = row * by_row + token * d
                _rotate_token(x, cosines[at : at + d], sines[at : at + d], new[token])


@njit(**OPTIONS)
def _rotate_token(x: Any, cosine: Any, sine: Any, y: Any) -> None:
    half = x.shape[0] // 2
    for i in range(half):
        put(y, i, get(x, i) * get(cosine, i) - get(x, half + i) * get(sine, i))
    for i in range(half):
        j = half + i
        put(y, j, get(x, j) * get(cosine, j) + get(x, i) * get(sine, j))


@njit(**OPTIONS)
def _largest(address: Any, kind: Any) -> None:
    """Find the largest number of each row, and where it first is.

    Args:
        address: Of these numbers: where x [rows, d], the numbers in float32 and the places in int64
            are; rows; d.
        kind: As in `_add_low_rank`.
    """
    numbers = carray(address, (5,), np.int64)
    n_rows, d = numbers[3], numbers[4]
    rows = carray(pointer(numbers[0]), (n_rows, d), kind)
    values = carray(pointer(numbers[1]), (n_rows,), np.float32)
    places = carray(pointer(numbers[2]), (n_rows,), np.int64)
    for row in range(member(), n_rows, size()):
        found, at = largest_of(rows[row, :STRETCH]), 0
        for start in range(STRETCH, d, STRETCH):
            value = largest_of(rows[row, start : start + STRETCH])
            # What is not below is above, or one of them is NaN, which then stays.
            if not value <= found and found == found:
                found, at = value, start
        values[row] = found
        while at < d - 1 and get(rows[row], at) != found:
            at += 1
        places[row] = at


@Loop
def rescale_bfloat16(address: Any) -> None:
    _rescale(address, np.uint16)


@Loop
def rescale_float32(address: Any) -> None:
    _rescale(address, np.float32)


@Loop
def add_and_rescale_bfloat16(address: Any) -> None:
    _add_and_rescale(address, np.uint16)


@Loop
def add_and_rescale_float32(address: Any) -> None:
    _add_and_rescale(address, np.float32)


@Loop
def gate_bfloat16(address: Any) -> None:
    _gate(address, np.uint16)


@Loop
def gate_float32(address: Any) -> None:
    _gate(address, np.float32)


@Loop
def rotate_bfloat16(address: Any) -> None:
    _rotate(address, np.uint16)


@Loop
def rotate_float32(address: Any) -> None:
    _rotate(address, np.float32)


@Loop
def largest_bfloat16(address: Any) -> None:
    _largest(address, np.uint16)


@Loop
def largest_float32(address: Any) -> None:
    _largest(address, np.float32)
