"""The loops themselves. Each takes addresses and sizes; sums are made in float32.

All of them are in this file: what is kept of a compiled loop is kept for its file as it is.
"""

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from worker.inference.engine.kernels.team import OPTIONS, Loop, member, size

TOKENS = 16
"""Tokens for which the matrices of an adapter are widened once."""


def _pointer(context: Any, address: Any) -> Any:
    """Make a pointer of a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


_at: Any = intrinsic(_pointer)


def _get(array: Any, i: Any) -> Any:
    """Return an element in float32; uint16 is bfloat16."""
    raise NotImplementedError


@overload(_get)
def _get_of(array: Any, i: Any) -> Any:
    def get(array: Any, i: Any) -> Any:
        return array[i]

    def get_widened(array: Any, i: Any) -> Any:
        return np.uint32(np.uint32(array[i]) << np.uint32(16)).view(np.float32)

    return get_widened if array.dtype == types.uint16 else get


def _put(array: Any, i: Any, value: Any) -> None:
    """Set an element, rounded to the nearest, of two to the even one."""
    raise NotImplementedError


@overload(_put)
def _put_of(array: Any, i: Any, value: Any) -> Any:
    def put(array: Any, i: Any, value: Any) -> None:
        array[i] = value

    def put_rounded(array: Any, i: Any, value: Any) -> None:
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        # A NaN would become a number, or infinity, by rounding.
        rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        array[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)

    return put_rounded if array.dtype == types.uint16 else put


@njit(**OPTIONS)
def _copy(source: Any, target: Any) -> None:
    for i in range(target.shape[0]):
        _put(target, i, _get(source, i))


@njit(**OPTIONS)
def _row(matrix: Any, r: int, nothing: Any) -> Any:
    """Return row `r`, or `nothing` past the last one."""
    return matrix[r] if r < matrix.shape[0] else nothing


@njit(**OPTIONS)
def _product(x: Any, row: Any) -> Any:
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * _get(row, i)
    return total


@njit(**OPTIONS)
def _products_of_two(x: Any, a: Any, r: int, h: Any) -> None:
    """As `_products`, for the two rows of `x` and of `h`."""
    x0, x1, a0, a1, a2, a3 = x[0], x[1], a[r], a[r + 1], a[r + 2], a[r + 3]
    h0 = h1 = h2 = h3 = k0 = k1 = k2 = k3 = np.float32(0)
    for i in range(x0.shape[0]):
        value, other, b0, b1, b2, b3 = x0[i], x1[i], a0[i], a1[i], a2[i], a3[i]
        h0 += value * b0
        h1 += value * b1
        h2 += value * b2
        h3 += value * b3
        k0 += other * b0
        k1 += other * b1
        k2 += other * b2
        k3 += other * b3
    h[0, r], h[0, r + 1], h[0, r + 2], h[0, r + 3] = h0, h1, h2, h3
    h[1, r], h[1, r + 1], h[1, r + 2], h[1, r + 3] = k0, k1, k2, k3


@njit(**OPTIONS)
def _add(y: Any, row: Any, share: Any) -> None:
    for i in range(y.shape[0]):
        y[i] += share * _get(row, i)


@njit(**OPTIONS)
def _add_to_two(y: Any, b: Any, r: int, h: Any) -> None:
    """As `_add`, for the two rows of `y` and of `h`."""
    y0, y1, b0, b1, b2, b3 = y[0], y[1], b[r], b[r + 1], b[r + 2], b[r + 3]
    h0, h1, h2, h3 = h[0, r], h[0, r + 1], h[0, r + 2], h[0, r + 3]
    k0, k1, k2, k3 = h[1, r], h[1, r + 1], h[1, r + 2], h[1, r + 3]
    for i in range(y0.shape[0]):
        c0, c1, c2, c3 = b0[i], b1[i], b2[i], b3[i]
        y0[i] += h0 * c0 + h1 * c1 + h2 * c2 + h3 * c3
        y1[i] += k0 * c0 + k1 * c1 + k2 * c2 + k3 * c3


@njit(**OPTIONS)
def _add_low_rank(numbers: Any, kind: Any) -> None:
    """y [rows, tokens, out] += x [rows, tokens, in] Aᵀ Bᵀ, by the matrices of each row.

    Args:
        numbers: Where y and x are; in; out; rows; tokens; where the first row's matrices are
            told: where A [r, in] and Bᵀ [r, out] are, and r, where 0 is nothing; by how many
            numbers that of the next row is further on.
        kind: Of all elements: uint16, which is bfloat16, or float32.
    """
    y, x, n_in, n_out = numbers[0], numbers[1], numbers[2], numbers[3]
    n_rows, n_tokens, places, stride = numbers[4], numbers[5], numbers[6], numbers[7]
    n_blocks = (n_tokens + TOKENS - 1) // TOKENS
    all_x = carray(_at(x), (n_rows * n_tokens, n_in), kind)
    all_y = carray(_at(y), (n_rows * n_tokens, n_out), kind)
    x32, y32 = np.zeros((2, n_in), np.float32), np.zeros((2, n_out), np.float32)
    no_a, no_b = np.zeros(n_in, kind), np.zeros(n_out, kind)
    a32, b32 = np.zeros((0, n_in), np.float32), np.zeros((0, n_out), np.float32)
    h = np.zeros((2, 0), np.float32)
    for task in range(member(), n_rows * n_blocks, size()):
        row, first = task // n_blocks, (task % n_blocks) * TOKENS
        place = carray(_at(places + row * stride * 8), (3,), np.int64)
        rank = place[2]
        if rank == 0:
            continue
        rounded = (rank + 3) // 4 * 4
        if h.shape[1] < rounded:
            h = np.zeros((2, rounded), np.float32)
        a = carray(_at(place[0]), (rank, n_in), kind)
        b = carray(_at(place[1]), (rank, n_out), kind)
        n = min(TOKENS, n_tokens - first)
        at = row * n_tokens + first
        xs, ys = all_x[at : at + n], all_y[at : at + n]
        if n == 1:
            _copy(xs[0], x32[0])
            _copy(ys[0], y32[0])
            for r in range(rank):
                h[0, r] = _product(x32[0], a[r])
            for r in range(rank):
                _add(y32[0], b[r], h[0, r])
            _copy(y32[0], ys[0])
            continue
        if a32.shape[0] != rounded:
            a32 = np.zeros((rounded, n_in), np.float32)
            b32 = np.zeros((rounded, n_out), np.float32)
        for r in range(rounded):
            _copy(_row(a, r, no_a), a32[r])
            _copy(_row(b, r, no_b), b32[r])
        for token in range(0, n, 2):
            n_both = min(2, n - token)
            for i in range(n_both):
                _copy(xs[token + i], x32[i])
                _copy(ys[token + i], y32[i])
            for r in range(0, rounded, 4):
                _products_of_two(x32, a32, r, h)
            for r in range(0, rounded, 4):
                _add_to_two(y32, b32, r, h)
            for i in range(n_both):
                _copy(y32[i], ys[token + i])


@njit(**OPTIONS)
def _rescale(numbers: Any, kind: Any, epsilon: float) -> None:
    """y [tokens, d] = w · x / sqrt(mean x² + ε), the quotient rounded before w (RMSNorm).

    Args:
        numbers: Where y, x and w are; tokens; d.
        kind: As in `_add_low_rank`.
        epsilon: ε.
    """
    y, x, w, n_tokens, d = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    ys = carray(_at(y), (n_tokens, d), kind)
    xs = carray(_at(x), (n_tokens, d), kind)
    weight = carray(_at(w), (d,), kind)
    share = (n_tokens + size() - 1) // size()
    for token in range(member() * share, min(n_tokens, (member() + 1) * share)):
        _rescale_token(xs[token], weight, ys[token], epsilon)


@njit(**OPTIONS)
def _rescale_token(x: Any, weight: Any, y: Any, epsilon: float) -> None:
    squares = np.float32(0)
    for i in range(x.shape[0]):
        value = _get(x, i)
        squares += value * value
    mean = squares / np.float32(x.shape[0])
    factor = np.float32(1) / np.sqrt(mean + np.float32(epsilon))
    for i in range(x.shape[0]):
        _put(y, i, _get(x, i) * factor)
    for i in range(x.shape[0]):
        _put(y, i, _get(y, i) * _get(weight, i))


@njit(**OPTIONS)
def _exp(x: Any) -> Any:
    """Return e^x within 2 of its last bits, for x <= 0; vectorised, which the library's is not."""
    x = max(x, np.float32(-87.0))
    whole = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    # ln 2 in two parts (Cody and Waite 1980), so that the difference is exact.
    rest = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    value = np.float32(1.9875691500e-4)
    value = value * rest + np.float32(1.3981999507e-3)
    value = value * rest + np.float32(8.3334519073e-3)
    value = value * rest + np.float32(4.1665795894e-2)
    value = value * rest + np.float32(1.6666665459e-1)
    value = value * rest + np.float32(5.0000001201e-1)
    value = value * rest * rest + rest + np.float32(1)
    return value * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**OPTIONS)
def _score(q: Any, k: Any) -> Any:
    total = np.float32(0)
    for i in range(q.shape[0]):
        total += q[i] * _get(k, i)
    return total


@njit(**OPTIONS)
def _softmax(scores: Any) -> None:
    largest = scores[0]
    for i in range(scores.shape[0]):
        largest = max(largest, scores[i])
    total = np.float32(0)
    for i in range(scores.shape[0]):
        scores[i] = _exp(scores[i] - largest)
        total += scores[i]
    for i in range(scores.shape[0]):
        scores[i] /= total


@njit(**OPTIONS)
def _add_times(total: Any, share: Any, v: Any) -> None:
    for i in range(total.shape[0]):
        total[i] += share * _get(v, i)


@njit(**OPTIONS)
def _attend(numbers: Any, kind: Any, scale: float) -> None:
    """Attention of one token a row to what its row holds, which has no gaps.

    Args:
        numbers: Where the result [rows, heads, d], the queries [rows, heads, d], the keys and
            the values [rows, key heads, …, d] are; where the tokens of each row are told; rows;
            heads; key heads; d; by how many elements the next row of keys and values is further
            on; and the next head.
        kind: As in `_add_low_rank`.
        scale: By which scores are multiplied.
    """
    n_rows, n_heads, n_shared, d = numbers[5], numbers[6], numbers[7], numbers[8]
    by_row, by_head = numbers[9], numbers[10]
    outputs = carray(_at(numbers[0]), (n_rows, n_heads, d), kind)
    queries = carray(_at(numbers[1]), (n_rows, n_heads, d), kind)
    all_keys = carray(_at(numbers[2]), (n_rows * by_row,), kind)
    all_values = carray(_at(numbers[3]), (n_rows * by_row,), kind)
    lengths = carray(_at(numbers[4]), (n_rows,), np.int64)
    n_each = n_heads // n_shared
    query, total = np.zeros(d, np.float32), np.zeros(d, np.float32)
    scores = np.zeros(0, np.float32)
    for task in range(member(), n_rows * n_shared, size()):
        row, shared = task // n_shared, task % n_shared
        n = lengths[row]
        if scores.shape[0] < n:
            scores = np.zeros(n, np.float32)
        first = row * by_row + shared * by_head
        keys = all_keys[first : first + n * d].reshape((n, d))
        values = all_values[first : first + n * d].reshape((n, d))
        for head in range(shared * n_each, (shared + 1) * n_each):
            _copy(queries[row, head], query)
            for i in range(d):
                query[i] *= np.float32(scale)
                total[i] = 0
            own = scores[:n]
            for token in range(n):
                own[token] = _score(query, keys[token])
            _softmax(own)
            for token in range(n):
                _add_times(total, own[token], values[token])
            _copy(total, outputs[row, head])


@njit(**OPTIONS)
def _store(numbers: Any, kind: Any) -> None:
    """Write the keys and values of one token a row into the rows, as the last of each.

    Args:
        numbers: Where the keys and the values of the tokens [rows, heads, d] are, and those of
            the rows [rows, heads, …, d]; where the tokens of each row are told; rows; heads; d;
            how many elements it is to the next row, and to the next head.
        kind: As in `_add_low_rank`.
    """
    n_rows, n_heads, d, by_row, by_head = numbers[5:10]
    lengths = carray(_at(numbers[4]), (n_rows,), np.int64)
    for both in range(2):
        tokens = carray(_at(numbers[both]), (n_rows, n_heads, d), kind)
        rows = carray(_at(numbers[2 + both]), (n_rows * by_row,), kind)
        for row in range(n_rows):
            for head in range(n_heads):
                at = row * by_row + head * by_head + (lengths[row] - 1) * d
                for i in range(d):
                    rows[at + i] = tokens[row, head, i]


@Loop
def store_bfloat16(address: Any) -> None:
    _store(carray(address, (10,), np.int64), np.uint16)


@Loop
def store_float32(address: Any) -> None:
    _store(carray(address, (10,), np.int64), np.float32)


@Loop
def add_low_rank_bfloat16(address: Any) -> None:
    _add_low_rank(carray(address, (8,), np.int64), np.uint16)


@Loop
def add_low_rank_float32(address: Any) -> None:
    _add_low_rank(carray(address, (8,), np.int64), np.float32)


@Loop
def rescale_bfloat16(address: Any) -> None:
    _rescale(carray(address, (5,), np.int64), np.uint16, carray(address, (6,), np.float64)[5])


@Loop
def rescale_float32(address: Any) -> None:
    _rescale(carray(address, (5,), np.int64), np.float32, carray(address, (6,), np.float64)[5])


@Loop
def attend_bfloat16(address: Any) -> None:
    _attend(carray(address, (11,), np.int64), np.uint16, carray(address, (12,), np.float64)[11])


@Loop
def attend_float32(address: Any) -> None:
    _attend(carray(address, (11,), np.int64), np.float32, carray(address, (12,), np.float64)[11])
