"""A weight in bfloat16 on a CPU, as the compiled loop multiplies with it."""

import torch
from torch.nn import functional

from worker.kernels import linear, tiles
from worker.kernels.memory import Shelf
from worker.kernels.operators import by_token

_WIDTH = tiles.BLOCK * tiles.WIDTH
_SHELF = Shelf()


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
        n_blocks = -(-self.out_features // _WIDTH)
        shape = (n_blocks, self.in_features // 2, tiles.BLOCK, tiles.WIDTH, 2)
        self._blocks = torch.empty(shape, dtype=torch.bfloat16)
        n_missing = n_blocks * _WIDTH - self.out_features
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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return bfloat16 [..., out] for `x`, bfloat16 [..., in].

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
        if not n_tokens:
            return y
        x = x if x.stride(-1) == 1 and x.dim() == 2 else x.contiguous()
        numbers = (
            *(y.data_ptr(), x.data_ptr(), self._blocks.data_ptr()),
            0 if self.bias is None else self.bias.data_ptr(),
            *(n_tokens, self.in_features, self.out_features),
            *(self.out_features, by_token(x)),
        )
        linear.multiply_bfloat16(numbers, len(self._blocks))
        return y
