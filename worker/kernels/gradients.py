"""The backward passes of what stands between products, and the loss at the end of all."""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.numbers import copy, exp, get, largest_of, pointer, put, share_of
from worker.kernels.team import OPTIONS, Loop, member, size


@njit(**OPTIONS)
def _rescale_back(address: Any, kind: Any) -> None:
    """The gradient of x, of y = w · x / sqrt(mean x² + ε), plus what comes by another way.

    Args:
        address: Of these numbers: where the result, the gradient of y, y, and what is added, or 0,
            [tokens, d] are; where w is; where one over the root of each token is, in float32;
            tokens; d; and whether y is given before it was multiplied with w.
        kind: Of all but the roots: uint16, which is bfloat16, or float32.
    """
    numbers = carray(address, (9,), np.int64)
    n_tokens, d, is_bare = numbers[6], numbers[7], numbers[8]
    results = carray(pointer(numbers[0]), (n_tokens, d), kind)
    gradients = carray(pointer(numbers[1]), (n_tokens, d), kind)
    ys = carray(pointer(numbers[2]), (n_tokens, d), kind)
    others = carray(pointer(numbers[3]), (n_tokens, d), kind)
    weight = carray(pointer(numbers[4]), (d,), kind)
    factors = carray(pointer(numbers[5]), (n_tokens,), np.float32)
    w, one_over_w = np.empty(d, np.float32), np.ones(d, np.float32)
    copy(weight, w)
    if not is_bare:
        for i in range(d):
            one_over_w[i] = np.float32(1) / w[i]
    normal, outer = np.empty(d, np.float32), np.empty(d, np.float32)
    share = (n_tokens + size() - 1) // size()
    for token in range(member() * share, min(n_tokens, (member() + 1) * share)):
        y, gradient, factor = ys[token], gradients[token], factors[token]
        along = np.float32(0)
        for i in range(d):
            normal[i] = get(y, i) * one_over_w[i]
            outer[i] = get(gradient, i) * w[i]
            along += normal[i] * outer[i]
        along /= np.float32(d)
        for i in range(d):
            outer[i] = (outer[i] - normal[i] * along) * factor
        if numbers[3] != 0:
            other = others[token]
            for i in range(d):
                outer[i] += get(other, i)
        copy(outer, results[token])


@njit(**OPTIONS)
def _gate_back(address: Any, kind: Any) -> None:
    """The gradients of g and u, of y = silu(g) · u, and y once more; [tokens, d] each.

    Args:
        address: Of these numbers: where the gradients of g and of u are to be put, and y; where the
            gradient of y, g and u are; tokens; d; by how many elements the next token of g and u,
            and of their gradients, is further on.
        kind: As in `_rescale_back`.
    """
    numbers = carray(address, (10,), np.int64)
    n_tokens, d, stride, by_result = numbers[6], numbers[7], numbers[8], numbers[9]
    to_gates = carray(pointer(numbers[0]), (n_tokens * by_result,), kind)
    to_values = carray(pointer(numbers[1]), (n_tokens * by_result,), kind)
    ys = carray(pointer(numbers[2]), (n_tokens, d), kind)
    gradients = carray(pointer(numbers[3]), (n_tokens, d), kind)
    gates = carray(pointer(numbers[4]), (n_tokens * stride,), kind)
    values = carray(pointer(numbers[5]), (n_tokens * stride,), kind)
    share = (n_tokens + size() - 1) // size()
    for token in range(member() * share, min(n_tokens, (member() + 1) * share)):
        at, to = token * stride, token * by_result
        _gate_token_back(
            gates[at : at + d],
            values[at : at + d],
            gradients[token],
            (to_gates[to : to + d], to_values[to : to + d], ys[token]),
        )


@njit(**OPTIONS)
def _gate_token_back(gate: Any, value: Any, gradient: Any, results: Any) -> None:
    to_gate, to_value, y = results
    for i in range(gate.shape[0]):
        x, other, outer = get(gate, i), get(value, i), get(gradient, i)
        power = exp(-abs(x))
        share = (np.float32(1) if x >= np.float32(0) else power) / (np.float32(1) + power)
        active = x * share
        put(to_value, i, outer * active)
        put(to_gate, i, outer * other * (share + active * (np.float32(1) - share)))
        put(y, i, active * other)


@njit(**OPTIONS)
def _cross_entropy(address: Any, kind: Any) -> None:
    """−log softmax(z)[label] of each row, in nats; its gradient takes the place of the logits z.

    Args:
        address: Of these numbers: where the logits [rows, d], the labels in int64, the losses in
            float32 and the hits in uint8 are; rows; d; and whether a gradient is wanted.
        kind: Of the logits.
    """
    numbers = carray(address, (7,), np.int64)
    n_rows, d = numbers[4], numbers[5]
    logits = carray(pointer(numbers[0]), (n_rows, d), kind)
    labels = carray(pointer(numbers[1]), (n_rows,), np.int64)
    losses = carray(pointer(numbers[2]), (n_rows,), np.float32)
    hits = carray(pointer(numbers[3]), (n_rows,), np.uint8)
    powers = np.empty(d, np.float32)
    for row in range(member(), n_rows, size()):
        z, label = logits[row], labels[row]
        largest = largest_of(z)
        total = np.float32(0)
        for i in range(d):
            powers[i] = exp(get(z, i) - largest)
            total += powers[i]
        own = get(z, label)
        losses[row] = np.log(total) + (largest - own)
        # Of equal logits the first is the answer.
        hits[row] = own == largest and (label == 0 or largest_of(z[:label]) < largest)
        if numbers[6]:
            share = share_of(total, largest)
            powers[label] -= total
            for i in range(d):
                put(z, i, powers[i] * share)


@Loop
def rescale_back_bfloat16(address: Any) -> None:
    _rescale_back(address, np.uint16)


@Loop
def rescale_back_float32(address: Any) -> None:
    _rescale_back(address, np.float32)


@Loop
def gate_back_bfloat16(address: Any) -> None:
    _gate_back(address, np.uint16)


@Loop
def gate_back_float32(address: Any) -> None:
    _gate_back(address, np.float32)


@Loop
def cross_entropy_bfloat16(address: Any) -> None:
    _cross_entropy(address, np.uint16)


@Loop
def cross_entropy_float32(address: Any) -> None:
    _cross_entropy(address, np.float32)
