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
        normal = x.float().mul_(inverse).to(x.dtype)  # of one dtype at a time: mixed ones are slow
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        normal, inverse, weight = ctx.saved_tensors
        outer, normal = (gradient * weight).float(), normal.float()
        along = (outer * normal).sum(-1, keepdim=True).div_(normal.shape[-1])
        to_x = outer.sub_(normal.mul_(along)).mul_(inverse)
        return to_x.to(gradient.dtype), None, None
