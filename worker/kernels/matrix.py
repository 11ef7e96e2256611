"""Weights in bfloat16 on a CPU, and what adapters add to them, as the compiled loop takes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch.nn import functional

from worker.kernels import linear, order, team, tiles
from worker.kernels.memory import Shelf
from worker.kernels.operators import by_token

COLUMNS = tiles.BLOCK * tiles.WIDTH
"""Those of a block."""
_SHELF = Shelf()
NOTHING = (0, 0, 1, 0)
"""What a loop is told where no adapter adds anything."""


class Rows(NamedTuple):
    """Where a loop is told of the `LowRank` of each row."""

    address: int
    """Of the place of each module's, as in `LowRank.place`, for each row."""
    by_row: int
    """By how many numbers those of the next row are further on."""
    n: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """A [r, in] and B [out, r] of ``y += x Aᵀ Bᵀ`` in bfloat16, in the order tiles read them in."""

    rank: int
    a: torch.Tensor
    """Of [groups of `WIDTH` rows, in / 2, `WIDTH`, 2] all numbers."""
    b: torch.Tensor
    """Of [blocks, r / 2, `BLOCK`, `WIDTH`, 2] all numbers."""
    place: tuple[int, int, int]
    """Where A and B are, and r."""


def in_order(
    matrices: Sequence[tuple[torch.Tensor, torch.Tensor]], scales: Iterable[float] | None = None
) -> list[LowRank]:
    """Return what loops read of each A [r, in] and B [out, r], side by side in huge pages.

    Args:
        matrices: All A and B; copied, wherever they are.
        scales: What each B is multiplied by, in float32; 1 where None.

    Raises:
        ValueError: a number of inputs is odd.
    """
    told: list[int] = []
    sizes: list[int] = []
    kept = []  # until the loop has read them
    for (a, b), scale in zip(matrices, scales or repeat(1.0, len(matrices)), strict=True):
        for matrix, width, factor in ((a, tiles.WIDTH, 1.0), (b, COLUMNS, scale)):
            n_columns, n_inner = matrix.shape
            is_wide = matrix.dtype != torch.bfloat16 or factor != 1
            own = matrix.float() if is_wide else matrix
            by_column, by_inner = own.stride()
            if 1 not in (by_column, by_inner):
                own, by_column, by_inner = own.contiguous(), n_inner, 1
            across = by_inner != 1
            by = by_inner if across else by_column
            told += (own.data_ptr(), by, across, is_wide, n_columns, n_inner)
            told += (width, team.bits_of(factor), 0)
            sizes.append(-(-n_columns // width) * width * (n_inner + n_inner % 2))
            kept.append(own)
        if a.shape[1] % 2:
            raise ValueError(f"A matrix of {a.shape[1]} inputs cannot be read in pairs.")
    if not sizes:
        return []
    n_bytes = 2 * sum(sizes)
    whole = Shelf(n_bytes).empty((n_bytes // 2,), torch.bfloat16)
    starts = accumulate((2 * size for size in sizes), initial=whole.data_ptr())
    places = list(starts)[:-1]
    told[order.N_NUMBERS - 1 :: order.N_NUMBERS] = places
    order.order.aside((len(sizes), *told))  # others are busy with passes
    pieces = whole.split(sizes)
    ranks = [len(a) for a, _ in matrices]
    return [
        LowRank(rank, a, b, (at_a, at_b, rank))
        for rank, a, b, at_a, at_b in zip(
            ranks, pieces[::2], pieces[1::2], places[::2], places[1::2], strict=True
        )
    ]


def part(first: int, n_out: int, module: int) -> tuple[int, int, int]:
    """Return what a loop is told of a module, of which a product has columns `first` and on.

    Raises:
        ValueError: they do not begin with a block.
    """
    if first % COLUMNS:
        raise ValueError(f"The columns of a module begin at {first}, inside of a block.")
    return first // COLUMNS, -(-(first + n_out) // COLUMNS), module


def add_packed_(y: torch.Tensor, x: torch.Tensor, rows: Rows, module: int) -> None:
    """Add to `y`, bfloat16 [rows, ..., out], what each row's `LowRank` makes of `x`, in place.

    Args:
        y: Each token is contiguous, and tokens follow at equal distances.
        x: bfloat16 [rows, ..., in].
        rows: Where each row's are.
        module: Which module of a row.

    Raises:
        ValueError: the tensors are of other rows or another dtype.
    """
    if y.shape[:-1] != x.shape[:-1] or len(x) != rows.n or {x.dtype, y.dtype} != {torch.bfloat16}:
        raise ValueError(
            f"Adapters of {rows.n} rows in bfloat16 do not go with {tuple(x.shape)} in {x.dtype} "
            f"and {tuple(y.shape)} in {y.dtype}."
        )
    x = x.contiguous()
    n_out, n_in = y.shape[-1], x.shape[-1]
    numbers = (
        *(y.data_ptr(), x.data_ptr(), 0, 0, x.numel() // n_in, n_in, n_out, by_token(y), n_in),
        *(*rows, 1, *part(0, n_out, module)),
    )
    linear.multiply_bfloat16(numbers, -(-n_out // COLUMNS))


class Matrix:
    """W [out, in] and b [out] of ``y = x Wᵀ + b``, bfloat16, in blocks of columns of y.

    Faster than oneDNN, which takes longer to begin than a small product takes, and for any number
    of tokens the same loop: a row's result does not depend on the others.

    Args:
        weight: [out, in], with an even number of inputs.
        bias: [out], or None.

    Raises:
        ValueError: the number of inputs is odd.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        if self.in_features % 2:
            raise ValueError(f"A matrix of {self.in_features} inputs cannot be read in pairs.")
        self.bias = None if bias is None else bias.contiguous()
        n_blocks = -(-self.out_features // COLUMNS)
        shape = (n_blocks, self.in_features // 2, tiles.BLOCK, tiles.WIDTH, 2)
        self._blocks = torch.empty(shape, dtype=torch.bfloat16)
        n_missing = n_blocks * COLUMNS - self.out_features
        whole = functional.pad(weight, (0, 0, 0, n_missing)) if n_missing else weight
        self._by_output().copy_(whole.reshape(n_blocks, tiles.BLOCK, tiles.WIDTH, -1, 2))

    def _by_output(self) -> torch.Tensor:
        """Return the blocks as [blocks, `BLOCK`, `WIDTH`, in / 2, 2], a view."""
        return self._blocks.permute(0, 2, 3, 1, 4)

    def settle_(self) -> None:
        """Move the weight to huge pages, beside others that stay as long as it does."""
        self._blocks = _SHELF.empty(tuple(self._blocks.shape), torch.bfloat16).copy_(self._blocks)

    def dense(self) -> torch.Tensor:
        """Return a copy of the weight [out, in]."""
        return self._by_output().reshape(-1, self.in_features)[: self.out_features]

    def __call__(self, x: torch.Tensor, added: Sequence[int] = ()) -> torch.Tensor:
        """Return bfloat16 [..., out] for `x`, bfloat16 [..., in].

        Args:
            x: With `added`, [rows, ..., in].
            added: What goes into the same sums, of each row's own `LowRank`: `Rows`, how many
                parts there are, and the numbers of `part` of each.

        Raises:
            ValueError: `x` is of another dtype or width.
        """
        if x.dtype != torch.bfloat16 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"A matrix in bfloat16 of {self.in_features} inputs does not multiply "
                f"{tuple(x.shape)} in {x.dtype}."
            )
        y = x.new_empty(*x.shape[:-1], self.out_features)
        n_tokens = y.numel() // self.out_features
        if added and (n_tokens % added[2] or added[3] > linear.MOST_PARTS):
            raise ValueError(
                f"Adapters of {added[2]} rows and {added[3]} modules do not go with "
                f"{tuple(x.shape)}."
            )
        if not n_tokens:
            return y
        x = x if x.stride(-1) == 1 and x.dim() == 2 else x.contiguous()
        numbers = (
            *(y.data_ptr(), x.data_ptr(), self._blocks.data_ptr()),
            0 if self.bias is None else self.bias.data_ptr(),
            *(n_tokens, self.in_features, self.out_features),
            *(self.out_features, by_token(x)),
            *(added or NOTHING),
        )
        linear.multiply_bfloat16(numbers, len(self._blocks))
        return y
