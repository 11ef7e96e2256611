"""The three losses of T-Few (Liu et al., arXiv 2205.05638, section 3.2), and its ranking."""

import torch
from torch.nn import functional

SAFE = 1 - 1e-6
"""The largest probability of a wrong token that counts: log(1 − p) stays finite."""


def likelihood(log_probs: torch.Tensor) -> torch.Tensor:
    """Return L_LM = −(1/T) Σ_t log p(y_t | x, y_<t) of a right choice (equation 1).

    Args:
        log_probs: Of its tokens, float32 [T].
    """
    return -log_probs.mean()


def unlikelihood(log_probs: torch.Tensor) -> torch.Tensor:
    """Return L_UL = −Σ_n Σ_t log(1 − p(ŷ_t)) / Σ_n T_n of the wrong choices (equation 2).

    Args:
        log_probs: Of the tokens of all of them, float32 [Σ_n T_n].
    """
    return -torch.log1p(-log_probs.exp().clamp(max=SAFE)).mean()


def length_normalised(scores: torch.Tensor) -> torch.Tensor:
    """Return L_LN = −log(e^{β(y)} / Σ e^{β}) with the right choice first (equation 4).

    Args:
        scores: β, the mean log-probability of a token, of each choice, float32 [C].
    """
    return functional.cross_entropy(
        scores[None], torch.zeros(1, dtype=torch.int64).to(scores.device)
    )


def scores_of(log_probs: list[torch.Tensor]) -> torch.Tensor:
    """Return β(x, y) = (1/T) Σ_t log p(y_t | x, y_<t) of each choice, float32 [C] (equation 3).

    The choice with the largest is the prediction (rank classification).
    """
    return torch.stack([each.mean() for each in log_probs])
