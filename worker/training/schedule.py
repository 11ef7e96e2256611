"""The learning rate over a run: a pure function of the step, so there is nothing to save."""

import math
from typing import Literal


def rate_factor(
    schedule: Literal["linear", "cosine", "constant"],
    index: int,
    total_steps: int,
    warmup_ratio: float,
) -> float:
    """Return what the learning rate is multiplied by in step `index`, counted from 0.

    Linear warm-up over ``round(warmup_ratio * total_steps)`` steps, then constant, or a decay that
    would reach 0 in the step after the last. Always in (0, 1].
    """
    n_warmup = round(warmup_ratio * total_steps)
    if index < n_warmup:
        return (index + 1) / n_warmup
    if schedule == "constant":
        return 1.0
    done = (index - n_warmup) / (total_steps - n_warmup)
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done))
