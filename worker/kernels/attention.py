"""Storing keys and values, and attending to them."""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.numbers import (
    add,
    add_four,
    copy,
    exp,
    largest_of,
    pointer,
    product,
)
from worker.kernels.team import OPTIONS, Loop, member, size


@njit(**OPTIONS)
def _store(address: Any, kind: Any) -> None:
    """Write the keys and values of one token a row into the rows, as the last of each.

    Args:
        address: Of these numbers: where the keys and the values of the tokens [rows, heads, d] are,
            and those of the rows [rows, heads, …, d]; where the tokens of each row are told; rows;
            heads; d; how many elements it is to the next row, and to the next head.
        kind: As in `_add_low_rank`.
    """
    numbers = carray(address, (10,), np.int64)
    n_rows, n_heads, d, by_row, by_head = numbers[5:10]
    lengths = carray(pointer(numbers[4]), (n_rows,), np.int64)
    for both in range(2):
        tokens = carray(pointer(numbers[both]), (n_rows, n_heads, d), kind)
        rows = carray(pointer(numbers[2 + both]), (n_rows * by_row,), kind)
        for row in range(n_rows):
            for head in range(n_heads):
                at = row * by_row + head * by_head + (lengths[row] - 1) * d
                for i in range(d):
                    rows[at + i] = tokens[row, head, i]


@njit(**OPTIONS)
def _softmax(scores: Any) -> None:
    largest = largest_of(scores)
    total = np.float32(0)
    for i in range(scores.shape[0]):
        scores[i] = exp(scores[i] - largest)
        total += scores[i]
    share = np.float32(1) / total
    for i in range(scores.shape[0]):
        scores[i] *= share


@njit(**OPTIONS)
def _attend(address: Any, kind: Any) -> None:
    """Attention of one token a row to what its row holds, which has no gaps.

    Args:
        address: Of these numbers: where the result [rows, heads, d], the queries [rows, heads, d],
            the keys and the values [rows, key heads, …, d] are; where the tokens of each row are
            told; rows; heads; key heads; d; by how many elements the next row of keys and values is
            further on; and the next head; and in float64 by what scores are multiplied.
        kind: As in `_add_low_rank`.
    """
    numbers = carray(address, (11,), np.int64)
    scale = carray(address, (12,), np.float64)[11]
    n_rows, n_heads, n_shared, d = numbers[5], numbers[6], numbers[7], numbers[8]
    by_row, by_head = numbers[9], numbers[10]
    outputs = carray(pointer(numbers[0]), (n_rows, n_heads, d), kind)
    queries = carray(pointer(numbers[1]), (n_rows, n_heads, d), kind)
    all_keys = carray(pointer(numbers[2]), (n_rows * by_row,), kind)
    all_values = carray(pointer(numbers[3]), (n_rows * by_row,), kind)
    lengths = carray(pointer(numbers[4]), (n_rows,), np.int64)
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
            copy(queries[row, head], query)
            for i in range(d):
                query[i] *= np.float32(scale)
                total[i] = 0
            own = scores[:n]
            for token in range(n):
                own[token] = product(query, keys[token])
            _softmax(own)
            for token in range(0, n - 3, 4):
                add_four(total, values, token, own)
            for token in range(n - n % 4, n):
                add(total, values[token], own[token])
            copy(total, outputs[row, head])


@Loop
def store_bfloat16(address: Any) -> None:
    _store(address, np.uint16)


@Loop
def store_float32(address: Any) -> None:
    _store(address, np.float32)


@Loop
def attend_bfloat16(address: Any) -> None:
    _attend(address, np.uint16)


@Loop
def attend_float32(address: Any) -> None:
    _attend(address, np.float32)
