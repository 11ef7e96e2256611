"""What LoRA adds to the layers that read one input, and its gradients, for all segments at once.

One call does what would be dozens of small ones, each of which takes longer to begin than to run.

What the loops here are told of: where x is, [tokens, inputs], bfloat16; by how many elements its
next row is further on; inputs; where the gradient of the outputs is, [tokens, all outputs]; by how
many elements its next row is further on; the number of parts; where each thread has
`gemm.SCRATCH_WORDS`.

Then of each part, which has the matrices of one adapter: its first token; its number of tokens; the
sum of its ranks; the number of its layers; where their table is; where all A [rank, inputs], times
their factors, and B [width, rank] are, bfloat16; where A x [tokens, ranks] is or goes, and its
gradient; where the gradients of the matrices go, float32, placed as these are; where the masks of x
are, [layers, tokens, words], or 0.

A table has of each layer: the first of its ranks; how many; the first of its outputs; how many;
behind how many elements of the matrices A is, and B; the factor of A, the bits of a float64.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from worker.kernels import gemm
from worker.kernels.gemm import ONE, tell, tell_factors
from worker.kernels.masks import WORD_BITS
from worker.kernels.numbers import pointer, put
from worker.kernels.team import OPTIONS, Loop, member, size
from worker.kernels.tiles import BLOCK, WIDTH

N_NUMBERS = 7
N_NUMBERS_OF_PART = 10
N_NUMBERS_OF_COLUMN = 7
N_NUMBERS_OF_CAST = 4
_WIDTH = BLOCK * WIDTH
_BLOCKS = 4
"""Blocks of columns of one task, where there are many."""
_ROWS = 64
"""Rows of one task."""


@njit(**OPTIONS)
def _part(address: Any, index: int) -> Any:
    first = N_NUMBERS + index * N_NUMBERS_OF_PART
    return carray(address, (first + N_NUMBERS_OF_PART,), np.int64)[first:]


@njit(**OPTIONS)
def _column(part: Any, index: int) -> Any:
    table = carray(pointer(part[4]), (part[3], N_NUMBERS_OF_COLUMN), np.int64)
    return table[index]


@njit(**OPTIONS)
def _mask(head: Any, part: Any, index: int) -> Any:
    """Return where the mask of the input of a layer is, or 0, and the distance of its rows."""
    n_bytes = (head[2] + WORD_BITS - 1) // WORD_BITS * 4
    return (part[9] + index * part[1] * n_bytes if part[9] != 0 else 0), n_bytes


@njit(**OPTIONS)
def _by_columns(head: Any, n_rows: int, n_columns: int, step: int, turn: int) -> int:
    """Compute the product of this thread's scratch, if its turn it is, `step` columns at a time."""
    for first in range(0, n_columns, step):
        if turn % size() == member():
            last = min(n_columns, first + step)
            gemm.multiply_one(head[6], (0, n_rows), (first, last))
        turn += 1
    return turn


@njit(**OPTIONS)
def _share_of(n: int) -> int:
    """Return how many of `n` tokens, which are columns, are one task: all tasks about equal."""
    n_tasks = (n + _WIDTH - 1) // _WIDTH
    return min(_WIDTH, ((n + n_tasks - 1) // n_tasks + WIDTH - 1) // WIDTH * WIDTH)


@njit(**OPTIONS)
def _to_hidden(address: Any) -> None:
    """Set A x of each part, of what is kept of x."""
    head, turn = carray(address, (N_NUMBERS,), np.int64), 0
    for number in range(head[5]):
        part = _part(address, number)
        x = (head[0] + part[0] * head[1] * 2, head[1], 1)
        n, n_ranks, place = part[1], part[2], part[6]
        if part[9] == 0:  # all layers see the same
            term = tell(head[6], (n_ranks, n), (place, n_ranks, 1), 0, ONE)
            tell_factors(term, (part[5], head[2], 0), x, head[2], n_ranks, (0, 0))
            turn = _by_columns(head, n_ranks, n, _share_of(n), turn)
            continue
        for index in range(part[3]):
            column = _column(part, index)
            a = (part[5] + column[4] * 2, head[2], 0)
            term = tell(head[6], (column[1], n), (place + column[0] * 2, n_ranks, 1), 0, ONE)
            tell_factors(term, a, x, head[2], column[1], _mask(head, part, index))
            turn = _by_columns(head, column[1], n, _share_of(n), turn)


@njit(**OPTIONS)
def _send_back(address: Any) -> None:
    """Set the gradients of A x and of B of each part, of the gradient of the outputs."""
    head, turn = carray(address, (N_NUMBERS,), np.int64), 0
    for number in range(head[5]):
        part = _part(address, number)
        n, n_ranks = part[1], part[2]
        for index in range(part[3]):
            column = _column(part, index)
            rank, n_out = column[1], column[3]
            outer = (head[3] + (part[0] * head[4] + column[2]) * 2, head[4], 0)
            b = (part[5] + column[5] * 2, rank, 0)
            term = tell(head[6], (n, rank), (part[7] + column[0] * 2, n_ranks, 0), 0, ONE)
            tell_factors(term, outer, b, n_out, n, (0, 0))
            for first in range(0, n, _ROWS):
                if turn % size() == member():
                    rows = (first, min(n, first + _ROWS))
                    gemm.multiply_one(head[6], rows, (0, rank))
                turn += 1
            hidden = (part[6] + column[0] * 2, n_ranks, 1)
            term = tell(head[6], (rank, n_out), (part[8] + column[5] * 4, rank, 1), 1, ONE)
            tell_factors(term, hidden, outer, n, rank, (0, 0))
            turn = _by_columns(head, rank, n_out, _BLOCKS * _WIDTH, turn)


@njit(**OPTIONS)
def _to_a(address: Any) -> None:
    """Set the gradients of A of each part, of that of A x and of what is kept of x."""
    head, turn = carray(address, (N_NUMBERS,), np.int64), 0
    for number in range(head[5]):
        part = _part(address, number)
        x = (head[0] + part[0] * head[1] * 2, head[1], 0)
        for index in range(part[3]):
            column = _column(part, index)
            to_hidden = (part[7] + column[0] * 2, part[2], 1)
            out = (part[8] + column[4] * 4, head[2], 0)
            term = tell(head[6], (column[1], head[2]), out, 1, column[6])
            tell_factors(term, to_hidden, x, part[1], column[1], _mask(head, part, index))
            turn = _by_columns(head, column[1], head[2], _BLOCKS * _WIDTH, turn)


@njit(**OPTIONS)
def _cast(address: Any) -> None:
    """Round matrices in float32, times their factors, to bfloat16.

    Args:
        address: Of the number of matrices, and of these of each: where it is; the number of its
            elements; its factor, the bits of a float64; where it goes.
    """
    n = carray(address, (1,), np.int64)[0]
    numbers = carray(address, (1 + n * N_NUMBERS_OF_CAST,), np.int64)
    factors = carray(address, (1 + n * N_NUMBERS_OF_CAST,), np.float64)
    for index in range(member(), n, size()):
        at = 1 + index * N_NUMBERS_OF_CAST
        source = carray(pointer(numbers[at]), (numbers[at + 1],), np.float32)
        target = carray(pointer(numbers[at + 3]), (numbers[at + 1],), np.uint16)
        factor = np.float32(factors[at + 2])
        for i in range(target.shape[0]):
            put(target, i, factor * source[i])


@Loop
def to_hidden(address: Any) -> None:
    _to_hidden(address)


@Loop
def send_back(address: Any) -> None:
    _send_back(address)


@Loop
def to_a(address: Any) -> None:
    _to_a(address)


@Loop
def cast(address: Any) -> None:
    _cast(address)


ALL = (to_hidden, send_back, to_a, cast)
