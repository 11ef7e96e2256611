"""Causal attention within rows of tokens, in bfloat16: each way in one loop over rows and heads.

A strip of queries at a time sees only the keys up to its end. Its scores stay in a cache, in
float32, and are made again in the backward pass, so that nothing grows with the square of a row.

What the loops that attend are told of: where, in int64, the rows' first tokens and their numbers of
tokens are; rows; heads; key heads; d; the factor of scores, the bits of a float64; where each
thread has `gemm.SCRATCH_WORDS`; where each thread has `scratch_bytes`; at least how many tokens the
longest row has, a multiple of `UNROLLED`. Then, of queries, keys, values, and the result or its
gradient, where they are and by how many elements the next token, and the next head, is further on;
and backward of the queries' gradient the same. Last where the gradients of keys and values go that
each head sends, [heads, tokens, d], float32: how many tokens; keys; values.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels.gemm import ONE, multiply_one, tell, tell_factors
from worker.kernels.heads import turn, turn_back
from worker.kernels.numbers import exp, get, largest_of, pointer, put, share_of
from worker.kernels.team import OPTIONS, Loop, member, size

STRIP = 96
"""Queries whose scores are there at a time, at most."""
UNROLLED = 64
"""Numbers that a loop over float32 takes at a time."""
N_NUMBERS = 28
N_NUMBERS_OF_TURN = 8
_NO_MASK = (0, 0)


def scratch_bytes(longest: int) -> int:
    """Return how much each thread needs for rows of up to `longest` tokens."""
    return STRIP * longest * 12  # two float32 and two bfloat16


@njit(**OPTIONS)
def _step(n: int) -> int:
    """Return how many of a row's `n` queries are a strip, so that all strips are about equal."""
    n_strips = (n + STRIP - 1) // STRIP
    return ((n + n_strips - 1) // n_strips + 7) // 8 * 8  # the rows of a tile


@njit(**OPTIONS)
def _strip(numbers: Any, part: int, n: int, kind: Any) -> Any:
    """Return a thread's matrix of `n` queries: scores or their gradient, 0 or 4; shares, 8; 10."""
    place = numbers[8] + member() * STRIP * numbers[9] * 12 + part * STRIP * numbers[9]
    return carray(pointer(place), (n, numbers[9]), kind)


@njit(**OPTIONS)
def _of(numbers: Any, tensor: int, token: int, head: int) -> Any:
    """Return where a head of a token is, and by how many elements the next token is further on."""
    place, by_token, by_head = numbers[10 + 3 * tensor : 13 + 3 * tensor]
    return place + (token * by_token + head * by_head) * 2, by_token


@njit(**OPTIONS)
def _products_of_strip(  # noqa: PLR0913 - a loop has its numbers as arguments
    numbers: Any, x: Any, y: Any, n: int, n_seen: int, factor: int, target: Any
) -> None:
    """Set float32 `target` [n, n_seen] to the products of tokens of `x` with tokens of `y`."""
    out = (target.ctypes.data, numbers[9], 0)
    term = tell(numbers[7], (n, n_seen), out, 1, factor)
    tell_factors(term, (x[0], x[1], 0), (y[0], y[1], 1), numbers[5], n, _NO_MASK)
    multiply_one(numbers[7], (0, n), (0, n_seen))


@njit(**OPTIONS)
def _sum_of_tokens(numbers: Any, shares: Any, y: Any, n_seen: int, out: Any, factor: int) -> None:
    """Set tokens `out` to sums of tokens `y`, each times its share."""
    n = shares.shape[0]
    term = tell(numbers[7], (n, numbers[5]), (out[0], out[1], 0), 0, factor)
    x = (shares.ctypes.data, numbers[9], 0)
    tell_factors(term, x, (y[0], y[1], 0), n_seen, n, _NO_MASK)
    multiply_one(numbers[7], (0, n), (0, numbers[5]))


@njit(**OPTIONS)
def _send(  # noqa: PLR0913
    numbers: Any, shares: Any, y: Any, n_seen: int, out: int, kind: int, factor: int
) -> None:
    """Set float32 `out` [n_seen, d] to what tokens `y` send by their shares, or add it."""
    n, d = shares.shape[0], numbers[5]
    term = tell(numbers[7], (n_seen, d), (out, d, 0), kind, factor)
    x = (shares.ctypes.data, numbers[9], 1)
    tell_factors(term, x, (y[0], y[1], 0), n, n_seen, _NO_MASK)
    multiply_one(numbers[7], (0, n_seen), (0, d))


@njit(**OPTIONS)
def _whole(n: int) -> int:
    """Return `n` or more: what the loops below go through without a rest, which is slow."""
    return (n + UNROLLED - 1) // UNROLLED * UNROLLED


@njit(**OPTIONS)
def _make_shares(scores: Any, shares: Any, first: int, n_keys: int) -> None:
    """Make probabilities of scores: the query of row i sees keys up to ``first + i``."""
    for i in range(scores.shape[0]):
        n = first + i + 1
        n_whole = _whole(n)
        own, made = scores[i, :n_whole], shares[i, :n_whole]
        own[n:] = own[0]
        largest = largest_of(own)
        own[n:] = largest - np.float32(100)  # adds nothing to a sum that is 1 at least
        total = np.float32(0)
        for j in range(n_whole):
            own[j] = exp(own[j] - largest)
            total += own[j]
        share = share_of(total, largest)
        for j in range(n_whole):
            put(made, j, own[j] * share)
        shares[i, n:n_keys] = 0


@njit(**OPTIONS)
def _send_to_scores(back: Any, shares: Any, made: Any, first: int, n_keys: int) -> None:
    """Make gradients of scores of those of their shares."""
    for i in range(back.shape[0]):
        n = first + i + 1
        n_whole = _whole(n)
        gradient, own, target = back[i, :n_whole], shares[i, :n_whole], made[i, :n_whole]
        gradient[n:] = np.float32(0)
        own[n:] = 0
        along = np.float32(0)
        for j in range(n_whole):
            along += gradient[j] * get(own, j)
        for j in range(n_whole):
            put(target, j, (gradient[j] - along) * get(own, j))
        made[i, n:n_keys] = 0


@njit(**OPTIONS)
def _attend(address: Any) -> None:
    """Set the result of each token and head to the values that it sees, times their shares."""
    numbers = carray(address, (N_NUMBERS,), np.int64)
    n_rows, n_heads = numbers[2:4]
    firsts = carray(pointer(numbers[0]), (n_rows,), np.int64)
    lengths = carray(pointer(numbers[1]), (n_rows,), np.int64)
    n_sharing = n_heads // numbers[4]
    for task in range(member(), n_rows * n_heads, size()):
        row, head = task // n_heads, task % n_heads
        first = firsts[row]
        keys = _of(numbers, 1, first, head // n_sharing)
        values = _of(numbers, 2, first, head // n_sharing)
        step = _step(lengths[row])
        for start in range(0, lengths[row], step):
            n_seen = min(lengths[row], start + step)
            n = n_seen - start
            scores = _strip(numbers, 0, n, np.float32)
            shares = _strip(numbers, 8, n, np.uint16)
            queries = _of(numbers, 0, first + start, head)
            _products_of_strip(numbers, queries, keys, n, n_seen, numbers[6], scores)
            _make_shares(scores, shares, start, n_seen)
            result = _of(numbers, 3, first + start, head)
            _sum_of_tokens(numbers, shares, values, n_seen, result, ONE)


@njit(**OPTIONS)
def _attend_back(address: Any) -> None:
    """Set the queries' gradients, and of each head what it sends to keys and values."""
    numbers = carray(address, (N_NUMBERS,), np.int64)
    n_rows, n_heads, scale, d = numbers[2], numbers[3], numbers[6], numbers[5]
    firsts = carray(pointer(numbers[0]), (n_rows,), np.int64)
    lengths = carray(pointer(numbers[1]), (n_rows,), np.int64)
    n_sharing = n_heads // numbers[4]
    for task in range(member(), n_rows * n_heads, size()):
        row, head = task // n_heads, task % n_heads
        first = firsts[row]
        keys = _of(numbers, 1, first, head // n_sharing)
        values = _of(numbers, 2, first, head // n_sharing)
        by_head = (head * numbers[25] + first) * d * 4
        to_keys, to_values = numbers[26] + by_head, numbers[27] + by_head
        kind = 1  # the last strip sees all and sets, others add
        step = _step(lengths[row])
        for start in range((lengths[row] - 1) // step * step, -1, -step):
            n_seen = min(lengths[row], start + step)
            n = n_seen - start
            scores = _strip(numbers, 0, n, np.float32)
            back = _strip(numbers, 4, n, np.float32)
            shares = _strip(numbers, 8, n, np.uint16)
            to_scores = _strip(numbers, 10, n, np.uint16)
            queries = _of(numbers, 0, first + start, head)
            outer = _of(numbers, 3, first + start, head)
            _products_of_strip(numbers, queries, keys, n, n_seen, scale, scores)
            _make_shares(scores, shares, start, n_seen)
            _products_of_strip(numbers, outer, values, n, n_seen, ONE, back)
            _send_to_scores(back, shares, to_scores, start, n_seen)
            to_queries = _of(numbers, 4, first + start, head)
            _sum_of_tokens(numbers, to_scores, keys, n_seen, to_queries, scale)
            _send(numbers, shares, outer, n_seen, to_values, kind, ONE)
            _send(numbers, to_scores, queries, n_seen, to_keys, kind, scale)
            kind = 2


@njit(**OPTIONS)
def _turn_heads(address: Any) -> None:
    """Put positions (RoPE) into heads of tokens [tokens, heads, d], in place.

    Args:
        address: Of these numbers: where the tokens are, bfloat16, and by how many elements the next
            one, and the next head, is further on; tokens; heads; d; where the cosines and sines
            [tokens, d] are.
    """
    numbers: Any = carray(address, (N_NUMBERS_OF_TURN,), np.int64)
    place, by_token, by_head, n, n_heads, d, cosines, sines = numbers
    share = (n + size() - 1) // size()
    made = np.empty(d, np.uint16)
    for token in range(member() * share, min(n, (member() + 1) * share)):
        cosine = carray(pointer(cosines + token * d * 2), (d,), np.uint16)
        sine = carray(pointer(sines + token * d * 2), (d,), np.uint16)
        for head in range(n_heads):
            at = place + (token * by_token + head * by_head) * 2
            own = carray(pointer(at), (d,), np.uint16)
            turn(own, cosine, sine, np.float32(1), made)
            own[:] = made


@njit(**OPTIONS)
def _join_back(address: Any) -> None:
    """Sum up what heads send to each key and value, and take positions out of queries and keys.

    Args:
        address: Of these numbers: as `_turn_heads` is told of the gradient of the queries, where
            the cosines are 0 if there are no positions in it; where that of the keys and that of
            the values goes, and how it lies, in three numbers each; key heads; and where what each
            head sends to keys and to values is, [heads, tokens, d], float32.
    """
    numbers = carray(address, (N_NUMBERS_OF_TURN + 9,), np.int64)
    place, by_token, by_head, n, n_heads, d, cosines, sines = numbers[:N_NUMBERS_OF_TURN]
    more = numbers[N_NUMBERS_OF_TURN:]
    n_keys = more[6]
    n_sharing = n_heads // n_keys
    share = (n + size() - 1) // size()
    made, total = np.empty(d, np.uint16), np.empty(d, np.float32)
    for token in range(member() * share, min(n, (member() + 1) * share)):
        cosine = carray(pointer(cosines + token * d * 2), (d,), np.uint16)
        sine = carray(pointer(sines + token * d * 2), (d,), np.uint16)
        if cosines != 0:
            for head in range(n_heads):
                at = place + (token * by_token + head * by_head) * 2
                own = carray(pointer(at), (d,), np.uint16)
                turn_back(own, cosine, sine, np.float32(1), made)
                own[:] = made
        for head in range(n_keys):
            for both in range(2):
                total[:] = np.float32(0)
                for number in range(head * n_sharing, (head + 1) * n_sharing):
                    at = more[7 + both] + (number * n + token) * d * 4
                    total += carray(pointer(at), (d,), np.float32)
                to = more[3 * both] + (token * more[3 * both + 1] + head * more[3 * both + 2]) * 2
                own = carray(pointer(to), (d,), np.uint16)
                if both == 0 and cosines != 0:
                    turn_back(total, cosine, sine, np.float32(1), own)
                else:
                    for i in range(d):
                        put(own, i, total[i])


@Loop
def attend(address: Any) -> None:
    _attend(address)


@Loop
def attend_back(address: Any) -> None:
    _attend_back(address)


@Loop
def turn_heads(address: Any) -> None:
    _turn_heads(address)


@Loop
def join_back(address: Any) -> None:
    _join_back(address)


ALL = (attend, attend_back, turn_heads, join_back)
