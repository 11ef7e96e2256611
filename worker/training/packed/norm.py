"""Root-mean-square normalisation (arXiv 1910.07467, equation 4) with a frozen weight, as one node.

``y = w · x / √(mean(x²) + ε)``. Kept for the backward pass: the normalised x in its own dtype and
one number for each token, instead of several float32 copies.
"""

from typing import Any

import torch


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        # One dtype at a time: operations on two of them are several times slower on a CPU.
        normal = x.to(torch.float32, copy=True).mul_(inverse).to(x.dtype)
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        normal, inverse, weight = ctx.saved_tensors
        outer, normal = (gradient * weight).float(), normal.to(torch.float32, copy=True)
        along = (outer * normal).sum(-1, keepdim=True).div_(normal.shape[-1])
        to_x = outer.sub_(normal.mul_(along)).mul_(inverse)
        return to_x.to(gradient.dtype), None, None
