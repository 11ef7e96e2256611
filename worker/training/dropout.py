"""Dropout that does not dominate the step on a CPU.

``nn.Dropout`` draws one random number for each element there, in one thread: a third of a QLoRA
step of a small model. Here the numbers of elements from one that is dropped to the next are drawn,
which are geometric: one number for each element that is dropped, usually one in twenty.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Return a seed from `generator`, on the CPU; from torch's own if None."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def seeded(seed: int) -> np.random.Generator:
    """Return numpy's fastest generator, in the state that `seed` gives it."""
    return np.random.Generator(np.random.SFC64(seed))


def dropped_positions(n: int, p: float, random: np.random.Generator) -> torch.Tensor:
    """Return which of `n` elements are dropped, each on its own with probability `p`.

    The gaps between them are geometric by inversion (Devroye, Non-Uniform Random Variate
    Generation, 1986, chapter X.2): ⌊E / −log(1 − p)⌋ for an exponential E, in float64.

    Args:
        n: Below 2³¹.
        p: In (0, 1).
        random: Is advanced.

    Returns:
        int64 [how many], ascending.
    """
    rate = -1 / math.log1p(-p)
    # Six deviations above the mean: that these do not reach the end is possible, and rare.
    n_drawn = math.ceil(n * p + 6 * math.sqrt(n * p * (1 - p))) + 8
    parts, last = [], -1
    while last < n:
        gaps = random.standard_exponential(n_drawn)
        gaps *= rate
        # A gap past the end ends the draw; its size does not matter, and no sum overflows.
        places = np.minimum(gaps, n, out=gaps).astype(np.int64)
        places += 1
        np.cumsum(places, out=places)
        places += last
        last = int(places[-1])
        parts.append(places)
    places = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return torch.from_numpy(places[: np.searchsorted(places, n)].copy())


class Drop:
    """Elements of a tensor that were chosen once and can be zeroed as often as wanted.

    Args:
        n: How many elements the tensor has.
        p: The probability of each to be chosen, in (0, 1).
        random: Is advanced.
        device: Where the tensor is. A CPU keeps the places, a GPU the seed of a mask.
    """

    def __init__(self, n: int, p: float, random: np.random.Generator, device: torch.device) -> None:
        self._p = p
        self._seed = 0
        self._positions: npt.NDArray[np.int64] | None = None
        if device.type == "cpu":
            self._positions = dropped_positions(n, p, random).numpy()
        else:
            self._seed = int(random.integers(2**63))

    def zero_(self, x: torch.Tensor) -> torch.Tensor:
        """Zero the chosen elements of `x`, which is contiguous, in place; return it."""
        if self._positions is not None:
            # numpy's is twice as fast as torch's; it has no bfloat16, whose zero is all bits zero.
            x.detach().view(-1).view(_BITS[x.element_size()]).numpy()[self._positions] = 0
            return x
        generator = torch.Generator(x.device).manual_seed(self._seed)
        return x.mul_(torch.empty_like(x).bernoulli_(1 - self._p, generator=generator))


class GapDropout(nn.Module):
    """Zero each element with probability `p` and scale the rest by 1/(1 − p).

    Draws from torch's global generator, so that a saved generator state repeats it.
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
        ctx.drop = Drop(x.numel(), p, seeded(draw_seed()), x.device)
        ctx.scale = 1 / (1 - p)
        scaled: torch.Tensor = ctx.drop.zero_((x * ctx.scale).contiguous())
        return scaled

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.drop.zero_((gradient * ctx.scale).contiguous()), None
