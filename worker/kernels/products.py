"""Sums of products as an operator on tensors in bfloat16, without a kernel for each shape."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from worker.kernels import gemm, tiles
from worker.kernels.memory import Shelf

_BLOCK = tiles.BLOCK * tiles.WIDTH
NO_MASK = (0, 0, 0)
_FEWEST_ROWS = 64
"""Threads share no fewer rows than these: each brings all of W into order."""


class Term(NamedTuple):
    """X [n, inner] · W [inner, columns], added to the rows of the result from `start` on.

    Of each, the numbers of a row or those of a column are neighbours.
    """

    x: torch.Tensor
    w: torch.Tensor
    start: int = 0


def is_supported(like: torch.Tensor) -> bool:
    """Tell whether there are sums of products of such tensors."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and tiles.is_supported()


def add_up_(
    terms: Iterable[Term],
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    n_rounded: int = 0,
    told: Sequence[int] = (),
) -> None:
    """Set `out` to the sum of all terms and `bias`, rounded once.

    Args:
        terms: In bfloat16.
        out: [rows, columns], bfloat16 or float32; the numbers of a row or those of a column are
            neighbours.
        bias: [columns], bfloat16, contiguous.
        n_rounded: The sum of so many terms and the bias is rounded to bfloat16 by itself.
        told: Further terms, as the loop is told of them (`gemm`).

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    terms = list(terms)
    n_rows, n_columns = out.shape
    if out.dtype is not torch.bfloat16 and out.dtype is not torch.float32:
        raise ValueError(f"Sums of products are not written in {out.dtype}.")
    if bias is not None and (
        bias.shape != (n_columns,) or bias.dtype != torch.bfloat16 or not bias.is_contiguous()
    ):
        raise ValueError(f"A bias {tuple(bias.shape)} in {bias.dtype} is not added to columns.")
    n_threads = torch.get_num_threads()
    numbers = [
        *(*_place(out), out.dtype is torch.float32),
        0 if bias is None else bias.data_ptr(),
        *(n_rows, n_columns, len(terms) + len(told) // gemm.N_NUMBERS_OF_TERM, n_rounded),
        *(_rows_each(n_rows, n_columns, n_threads), scratch(n_threads), gemm.ONE),
    ]
    for x, w, start in terms:
        n, inner = x.shape
        if w.shape != (inner, n_columns) or not 0 <= start <= n_rows - n:
            raise ValueError(
                f"A product of {tuple(x.shape)} and {tuple(w.shape)} from row {start} on does not "
                f"fit into {tuple(out.shape)}."
            )
        numbers += (*_factor(x), *_factor(w), inner, start, start + n, *NO_MASK)
    numbers += told
    if n_rows and n_columns:
        gemm.multiply_sums(numbers, n_threads)


def _factor(matrix: torch.Tensor) -> tuple[int, int, int]:
    if matrix.dtype is not torch.bfloat16:
        raise ValueError(f"Products are of bfloat16, not of {matrix.dtype}.")
    return _place(matrix)


def _place(matrix: torch.Tensor) -> tuple[int, int, int]:
    """Return where it is, and how far the next row is and 0, or the next column and 1."""
    by_row, by_column = matrix.stride()
    if by_column == 1:
        return matrix.data_ptr(), by_row, 0
    if by_row == 1:
        return matrix.data_ptr(), by_column, 1
    raise ValueError(f"Neither rows nor columns of strides {matrix.stride()} are in one piece.")


def _rows_each(n_rows: int, n_columns: int, n_threads: int) -> int:
    """Return how many rows each thread has, or 0 if each is to have its own columns."""
    n_blocks = -(-n_columns // _BLOCK)
    n_each = -(-n_blocks // n_threads)
    if n_rows < _FEWEST_ROWS or n_each * n_threads <= 1.1 * n_blocks:
        return 0
    return -(-n_rows // n_threads // 16) * 16


_SHELF = Shelf()
_scratches: dict[int, torch.Tensor] = {}


@cache
def scratch(n_threads: int) -> int:
    """Return where each thread makes sums: under Python's lock, one loop runs at a time."""
    found = _scratches[n_threads] = _SHELF.empty((n_threads, gemm.SCRATCH_WORDS), torch.float32)
    return found.data_ptr()
