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
        normal = torch.mul(x, inverse, out=torch.empty_like(x))
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        normal, inverse, weight = ctx.saved_tensors
        outer = gradient * weight
        along = (outer * normal).sum(-1, keepdim=True, dtype=torch.float32)
        along.div_(normal.shape[-1])
        return ((outer - normal * along) * inverse).to(gradient.dtype), None, None
