"""Losses over pairs of sentence embeddings."""

import torch
from torch.nn import functional


def in_batch(
    first: torch.Tensor, second: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each pair, all other partners being wrong, and whether it ranks first.

    −log(exp(cos(a_i, b_i) / τ) / Σ_j exp(cos(a_i, b_j) / τ)), the mean of both directions:
    van den Oord et al., arXiv 1807.03748, equation 4; with in-batch negatives as in Henderson et
    al., arXiv 1705.00652, section 4.4.

    Args:
        first: Embeddings, float32 [N, D].
        second: Those of what belongs to them, float32 [N, D].
        temperature: τ.

    Returns:
        float32 [N] in nats, and bool [N].
    """
    similarity = functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).t()
    logits = similarity / temperature
    own = torch.arange(len(logits), device=logits.device)
    forth = functional.cross_entropy(logits, own, reduction="none")
    back = functional.cross_entropy(logits.t(), own, reduction="none")
    return (forth + back) / 2, logits.detach().argmax(-1) == own


def scored(
    first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos(a, b) − score)² of each pair, and whether the error is below 0.1.

    Reimers and Gurevych, arXiv 1908.10084, section 3, regression objective.

    Args:
        first: Embeddings, float32 [N, D].
        second: Those of the other sentences, float32 [N, D].
        scores: How alike they are, float32 [N], from −1 to 1.
    """
    error = functional.cosine_similarity(first, second) - scores
    return error.square(), error.detach().abs() < 0.1
