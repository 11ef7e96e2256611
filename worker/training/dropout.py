"""Dropout that does not dominate the step on a CPU.

``nn.Dropout`` draws its random numbers one by one there, in one thread: a third of a QLoRA step of
a small model. Here all threads draw one bit for each element, which are kept for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from worker.kernels.training import draw_masks, zero_dropped_


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Return a seed from `generator`, on the CPU; from torch's own if None."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


class Drop:
    """Elements of tensors of one shape, chosen once, that can be zeroed as often as wanted.

    Args:
        rates: Of each such tensor, the probability of its elements to be chosen, in [0, 1).
        n_rows: How many rows each tensor has.
        width: And how many elements each row.
        seed: On which the choice depends, and on nothing else.
        device: Where the tensors are. A CPU keeps the choice, a GPU the seed.
    """

    def __init__(
        self, rates: Sequence[float], n_rows: int, width: int, seed: int, device: torch.device
    ) -> None:
        self.rates = rates
        self._seed = seed
        self.masks: torch.Tensor | None = None
        """int32 [tensors, rows, words], as `draw_masks` makes them; None on a GPU."""
        if device.type == "cpu":
            self.masks = draw_masks(rates, n_rows, width, seed)

    def zero_(self, x: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Zero what is chosen of tensor `index`, `x`, which is contiguous, in place; return it."""
        if self.masks is not None:
            zero_dropped_(x.detach(), self.masks[index])
            return x
        generator = torch.Generator(x.device).manual_seed((self._seed + index) % 2**63)
        mask = torch.empty_like(x).bernoulli_(1 - self.rates[index], generator=generator)
        return x.mul_(mask)


class BitDropout(nn.Module):
    """Zero each element with probability `p` and scale the rest by 1/(1 − p).

    Draws a seed from torch's global generator, so that a saved generator state repeats it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 < p < 1:
            raise ValueError(f"p is {p}; it must be between 0 and 1.")
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor like `x`; in evaluation mode, `x` itself."""
        if not self.training:
            return x
        dropped: torch.Tensor = _Dropout.apply(x, self.p)
        return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        width = x.shape[-1] if x.dim() else 1
        n_rows = x.numel() // width if width else 0
        ctx.drop = Drop([p], n_rows, width, draw_seed(), x.device)
        ctx.scale = 1 / (1 - p)
        scaled: torch.Tensor = ctx.drop.zero_((x * ctx.scale).contiguous())
        return scaled

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.drop.zero_((gradient * ctx.scale).contiguous()), None
