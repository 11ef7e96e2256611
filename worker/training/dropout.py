"""Dropout that does not dominate the step on a CPU.

``nn.Dropout`` draws one random number for each element there, in one thread: a third of a QLoRA
step of a small model. This one cuts every 64 random bits into four decisions.
"""

import torch
from torch import nn

_LANES = 4
_LEVELS = 2**16


def keep_scale(x: torch.Tensor, p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Return a tensor like `x`: 0 with probability `p`, rounded to 1/65536, else 1/(1 − p).

    Args:
        x: Gives shape, dtype and device.
        p: In (0, 1).
        generator: Of the device of `x`; torch's global one if None.
    """
    if x.device.type != "cpu":
        kept = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
        return kept.div_(1 - p)
    n_dropped = min(_LEVELS - 1, max(1, round(p * _LEVELS)))
    n_draws = -(-x.numel() // _LANES)
    bits = torch.empty(n_draws, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    lanes = bits.view(torch.int16)[: x.numel()].view(x.shape)
    kept = lanes >= n_dropped - _LEVELS // 2
    return kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - n_dropped))


class LaneDropout(nn.Module):
    """Zero each element with probability `p` and scale the rest by 1/(1 − p), by `keep_scale`.

    Draws from torch's global generator, so that a saved generator state repeats it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 < p < 1:
            raise ValueError(f"p is {p}; it must be between 0 and 1.")
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor like `x`; in evaluation mode, `x` itself."""
        return x * keep_scale(x, self.p, None) if self.training else x
