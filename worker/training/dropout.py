"""Dropout that does not dominate the step on a CPU.

``nn.Dropout`` draws one random number for each element there, in one thread: a third of a QLoRA
step of a small model. This one cuts every 64 random bits into four decisions.
"""

import torch
from torch import nn

_LANES = 4
_LEVELS = 2**16


class LaneDropout(nn.Module):
    """Zero each element with probability `p`, rounded to 1/65536, and scale the rest by 1/(1 − p).

    Draws from torch's global generator, so that a saved generator state repeats it. On any other
    device than a CPU it is torch's own dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 < p < 1:
            raise ValueError(f"p is {p}; it must be between 0 and 1.")
        self.p = p
        self._n_dropped_levels = min(_LEVELS - 1, max(1, round(p * _LEVELS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor like `x`; in evaluation mode, `x` itself."""
        if not self.training:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        n_draws = -(-x.numel() // _LANES)
        bits = torch.empty(n_draws, dtype=torch.int64).random_(-(2**63), None)
        lanes = bits.view(torch.int16)[: x.numel()].view(x.shape)
        kept = lanes >= self._n_dropped_levels - _LEVELS // 2
        scale = _LEVELS / (_LEVELS - self._n_dropped_levels)
        return x * kept.to(x.dtype).mul_(scale)
