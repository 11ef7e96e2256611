"""Rows of several lengths, head by head, and what stands between the products of attention.

Tokens of all rows lie one after another; heads of rows lie side by side, as long as the longest
row, with nothing, which is 0, after the end of shorter ones.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.numbers import exp, get, largest_of, pointer, put, share_of
from worker.kernels.team import OPTIONS, Loop, member, size


@njit(**OPTIONS)
def _split(address: Any, kind: Any) -> None:
    """Copy heads of tokens to [rows, heads, n, d], with positions in them (RoPE).

    Args:
        address: Of these numbers: where the result, the tokens and, in int64, the rows' first
            tokens and their numbers of tokens are; where the cosines and sines of all tokens
            [tokens, d] are, or 0 and 0; rows; heads; n; d; by how many elements the next token,
            and the next head of one, is further on; and in float64 by what each is multiplied.
        kind: Of all elements: uint16, which is bfloat16, or float32.
    """
    numbers = carray(address, (12,), np.int64)
    scale = np.float32(carray(address, (13,), np.float64)[12])
    n_rows, n_heads, n, d, by_token, by_head = numbers[6:12]
    heads = carray(pointer(numbers[0]), (n_rows * n_heads, n, d), kind)
    firsts = carray(pointer(numbers[2]), (n_rows,), np.int64)
    lengths = carray(pointer(numbers[3]), (n_rows,), np.int64)
    end = firsts[n_rows - 1] + lengths[n_rows - 1]
    tokens = carray(pointer(numbers[1]), (end * by_token + n_heads * by_head,), kind)
    cosines = carray(pointer(numbers[4]), (end, d), kind)
    sines = carray(pointer(numbers[5]), (end, d), kind)
    for task in range(member(), n_rows * n_heads, size()):
        row, head = task // n_heads, task % n_heads
        own = heads[task]
        for i in range(lengths[row]):
            token = firsts[row] + i
            at = token * by_token + head * by_head
            if numbers[4] != 0:
                turn(tokens[at : at + d], cosines[token], sines[token], scale, own[i])
            else:
                _scale(tokens[at : at + d], scale, own[i])
        for i in range(lengths[row], n):
            for j in range(d):
                own[i, j] = 0


@njit(**OPTIONS)
def _join(address: Any, kind: Any) -> None:
    """Copy [rows, heads, n, d] back to tokens, with positions taken out of them.

    Args:
        address: As in `_split`, where the result are the tokens.
        kind: The same.
    """
    numbers = carray(address, (12,), np.int64)
    scale = np.float32(carray(address, (13,), np.float64)[12])
    n_rows, n_heads, n, d, by_token, by_head = numbers[6:12]
    heads = carray(pointer(numbers[0]), (n_rows, n_heads, n, d), kind)
    firsts = carray(pointer(numbers[2]), (n_rows,), np.int64)
    lengths = carray(pointer(numbers[3]), (n_rows,), np.int64)
    end = firsts[n_rows - 1] + lengths[n_rows - 1]
    tokens = carray(pointer(numbers[1]), (end * by_token + n_heads * by_head,), kind)
    cosines = carray(pointer(numbers[4]), (end, d), kind)
    sines = carray(pointer(numbers[5]), (end, d), kind)
    for row in range(n_rows):
        for i in range(member(), lengths[row], size()):
            token = firsts[row] + i
            for head in range(n_heads):
                at = token * by_token + head * by_head
                x, y = heads[row, head, i], tokens[at : at + d]
                if numbers[4] != 0:
                    turn_back(x, cosines[token], sines[token], scale, y)
                else:
                    _scale(x, scale, y)


@njit(**OPTIONS)
def _scale(x: Any, scale: Any, y: Any) -> None:
    for i in range(x.shape[0]):
        put(y, i, get(x, i) * scale)


@njit(**OPTIONS)
def turn(x: Any, cosine: Any, sine: Any, scale: Any, y: Any) -> None:
    half = x.shape[0] // 2
    for i in range(half):
        put(y, i, (get(x, i) * get(cosine, i) - get(x, half + i) * get(sine, i)) * scale)
    for i in range(half):
        j = half + i
        put(y, j, (get(x, j) * get(cosine, j) + get(x, i) * get(sine, j)) * scale)


@njit(**OPTIONS)
def turn_back(x: Any, cosine: Any, sine: Any, scale: Any, y: Any) -> None:
    """The transpose of `turn`, which is its backward pass."""
    half = x.shape[0] // 2
    for i in range(half):
        j = half + i
        put(y, i, (get(x, i) * get(cosine, i) + get(x, j) * get(sine, j)) * scale)
    for i in range(half):
        j = half + i
        put(y, j, (get(x, j) * get(cosine, j) - get(x, i) * get(sine, i)) * scale)


@njit(**OPTIONS)
def _causal_softmax(address: Any, kind: Any) -> None:
    """Make probabilities of scores, in place, of what a position sees: itself and all before.

    Args:
        address: Of these numbers: where the scores [heads, queries, n] are, whose positions are 0
            to n − 1 again and again; heads · queries; n.
        kind: As in `_split`.
    """
    numbers = carray(address, (3,), np.int64)
    n_rows, n = numbers[1], numbers[2]
    rows = carray(pointer(numbers[0]), (n_rows, n), kind)
    powers = np.empty(n, np.float32)
    n_each = (n_rows + size() - 1) // size()
    for row in range(member() * n_each, min(n_rows, (member() + 1) * n_each)):
        own, n_seen = rows[row], row % n + 1
        largest = largest_of(own[:n_seen])
        total = np.float32(0)
        for i in range(n_seen):
            powers[i] = exp(get(own, i) - largest)
            total += powers[i]
        share = share_of(total, largest)
        for i in range(n_seen):
            put(own, i, powers[i] * share)
        for i in range(n_seen, n):
            own[i] = 0


@njit(**OPTIONS)
def _causal_softmax_back(address: Any, kind: Any) -> None:
    """Make the gradient of scores of that of their probabilities, in place.

    Args:
        address: Of these numbers: where the gradient and the probabilities [heads, queries, n] are;
            heads · queries; n.
        kind: As in `_split`.
    """
    numbers = carray(address, (4,), np.int64)
    n_rows, n = numbers[2], numbers[3]
    gradients = carray(pointer(numbers[0]), (n_rows, n), kind)
    shares = carray(pointer(numbers[1]), (n_rows, n), kind)
    share = (n_rows + size() - 1) // size()
    for row in range(member() * share, min(n_rows, (member() + 1) * share)):
        gradient, own, n_seen = gradients[row], shares[row], row % n + 1
        along = np.float32(0)
        for i in range(n_seen):
            along += get(gradient, i) * get(own, i)
        for i in range(n_seen):
            put(gradient, i, (get(gradient, i) - along) * get(own, i))
        for i in range(n_seen, n):
            gradient[i] = 0


@Loop
def split_bfloat16(address: Any) -> None:
    _split(address, np.uint16)


@Loop
def split_float32(address: Any) -> None:
    _split(address, np.float32)


@Loop
def join_bfloat16(address: Any) -> None:
    _join(address, np.uint16)


@Loop
def join_float32(address: Any) -> None:
    _join(address, np.float32)


@Loop
def causal_softmax_bfloat16(address: Any) -> None:
    _causal_softmax(address, np.uint16)


@Loop
def causal_softmax_float32(address: Any) -> None:
    _causal_softmax(address, np.float32)


@Loop
def causal_softmax_back_bfloat16(address: Any) -> None:
    _causal_softmax_back(address, np.uint16)


@Loop
def causal_softmax_back_float32(address: Any) -> None:
    _causal_softmax_back(address, np.float32)
