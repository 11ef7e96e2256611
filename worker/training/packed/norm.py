"""Root-mean-square normalisation (arXiv 1910.07467, equation 4) with a frozen weight, as one node.

``y = w · x / √(mean(x²) + ε)``. Kept for the backward pass: y, which the layers that read it keep
anyway, and one number for each token, instead of several float32 copies.
"""

from typing import Any

import torch


class RmsNorm(torch.autograd.Function):
    """``apply(x, weight, epsilon, divides)`` for x [..., D] and weight [D]; returns [..., D].

    With `divides`, the normalised x is made again as y / w (`can_divide`), else kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, divides: bool
    ) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        # One dtype at a time: operations on two of them are several times slower on a CPU.
        normal = x.to(torch.float32, copy=True).mul_(inverse).to(x.dtype)
        y = normal * weight
        ctx.save_for_backward(y if divides else normal, inverse, weight)
        ctx.divides = divides
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        kept, inverse, weight = ctx.saved_tensors
        outer, normal = (gradient * weight).float(), kept.to(torch.float32, copy=True)
        if ctx.divides:
            normal.div_(weight.float())
        along = (outer * normal).sum(-1, keepdim=True).div_(normal.shape[-1])
        to_x = outer.sub_(normal.mul_(along)).mul_(inverse)
        return to_x.to(gradient.dtype), None, None, None


def can_divide(weight: torch.Tensor) -> bool:
    """Tell whether x = (x · w) / w for all normalised x within rounding: no w is zero or tiny."""
    limits = torch.finfo(weight.dtype)
    return bool(weight.abs().min() > limits.tiny / limits.eps)
