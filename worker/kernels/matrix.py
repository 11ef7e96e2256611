"""Weights in bfloat16 on a CPU, and what adapters add to them, as the compiled loop takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from worker.kernels import linear, tiles
from worker.kernels.memory import Shelf, aligned
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


class LowRank:
    """A [r, in] and B [out, r] of ``y += x Aᵀ Bᵀ`` in bfloat16, in the order tiles read them in.

    Args:
        a: [r, in], with an even number of inputs.
        b: [out, r].

    Raises:
        ValueError: the number of inputs is odd.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.rank, n_in = a.shape
        if n_in % 2:
            raise ValueError(f"A matrix of {n_in} inputs cannot be read in pairs.")
        whole = functional.pad(a.bfloat16(), (0, 0, 0, -self.rank % tiles.WIDTH))
        by_group = whole.view(-1, tiles.WIDTH, n_in // 2, 2)
        self.a = by_group.permute(0, 2, 1, 3).contiguous()
        """[groups of `WIDTH` rows, in / 2, `WIDTH`, 2]."""
        whole = functional.pad(b.bfloat16(), (0, self.rank % 2, 0, -len(b) % COLUMNS))
        by_block = whole.view(-1, tiles.BLOCK, tiles.WIDTH, whole.shape[1] // 2, 2)
        self.b = by_block.permute(0, 3, 1, 2, 4).contiguous()
        """[blocks, r / 2, `BLOCK`, `WIDTH`, 2]."""

    @property
    def n_bytes(self) -> int:
        """How much both take on a shelf."""
        return aligned(self.a.nbytes) + aligned(self.b.nbytes)

    def settle_(self, shelf: Shelf) -> None:
        """Move both to `shelf`."""
        self.a, self.b = (
            shelf.empty(tuple(each.shape), torch.bfloat16).copy_(each) for each in (self.a, self.b)
        )

    @property
    def place(self) -> tuple[int, int, int]:
        """Where A and B are, and r."""
        return self.a.data_ptr(), self.b.data_ptr(), self.rank


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
