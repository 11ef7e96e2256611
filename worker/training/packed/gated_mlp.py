"""The gated feed-forward ``down(silu(gate x) · up x)`` (arXiv 2002.05202) as two products.

Between them only the two halves of the first product are kept; the activation is made again in the
backward pass.
"""

from typing import Any

import torch
from torch.nn import functional


class SiluProduct(torch.autograd.Function):
    """silu(gate) · up for [..., 2·I] that holds both side by side."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        ctx.save_for_backward(both)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        to_both = torch.empty_like(both)
        to_gate, to_up = to_both.chunk(2, -1)
        torch.mul(gradient, functional.silu(gate), out=to_up)
        to_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return to_both
