"""Root-mean-square normalisation (arXiv 1910.07467, equation 4) with a frozen weight, as one node.

``y = w · x / √(mean(x²) + ε)``. Kept for the backward pass: y, which the layers that read it keep
anyway, and one number for each token, instead of several float32 copies.
"""

from typing import Any

import torch

from worker.training.packed import pool
from worker.training.packed.between import Operators, operators_of


class RmsNorm(torch.autograd.Function):
    """``apply(x, weight, epsilon, divides)`` for x [..., D] and weight [D]; returns [..., D].

    With `divides`, the normalised x is made again as y / w (`can_divide`), else kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, divides: bool
    ) -> torch.Tensor:
        own = _operators_of(x, weight)
        ctx.divides, ctx.own = divides, own
        if own is not None and divides:
            inverse = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            out = pool.empty(x, *x.shape)
            y = own.rescale(x.contiguous(), weight, epsilon, out=out, factors=inverse)
            ctx.save_for_backward(y, inverse, weight)
            return y
        wide = pool.copy(x, torch.float32)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        # One dtype at a time: operations on two of them are several times slower on a CPU.
        normal = pool.cast(wide.mul_(inverse), x.dtype)
        y = torch.mul(normal, weight, out=pool.empty(x, *x.shape))
        ctx.save_for_backward(y if divides else normal, inverse, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        kept, inverse, weight = ctx.saved_tensors
        shape = gradient.shape
        if ctx.own is not None:
            to_x = ctx.own.rescale_back(
                gradient.contiguous(),
                kept,
                weight,
                inverse,
                None,
                out=pool.empty(gradient, *shape),
                is_bare=not ctx.divides,
            )
            return to_x, None, None, None
        weighted = torch.mul(gradient, weight, out=pool.empty(gradient, *shape))
        outer, normal = pool.cast(weighted, torch.float32), pool.copy(kept, torch.float32)
        if ctx.divides:
            normal.div_(weight.float())
        product = torch.mul(outer, normal, out=pool.empty(outer, *shape))
        along = product.sum(-1, keepdim=True).div_(shape[-1])
        to_x = outer.sub_(normal.mul_(along)).mul_(inverse)
        return pool.cast(to_x, gradient.dtype), None, None, None


def _operators_of(x: torch.Tensor, weight: torch.Tensor) -> Operators | None:
    return operators_of(x) if weight.dtype == x.dtype else None


def can_divide(weight: torch.Tensor) -> bool:
    """Tell whether x = (x · w) / w for all normalised x within rounding: no w is zero or tiny."""
    limits = torch.finfo(weight.dtype)
    return bool(weight.abs().min() > limits.tiny / limits.eps)
