"""Losses over pairs of answers, from the log-probabilities of their tokens."""

import torch
from torch.nn import functional

from worker.training.objectives.base import IGNORED, Batch, LanguageForward


def per_sequence(values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of `values` [N] (one for each target) over each sequence, and their numbers.

    Returns:
        float32 [S] and int64 [S] for the S sequences of the batch.
    """
    sequence = torch.repeat_interleave(
        torch.arange(len(batch.lengths)), torch.tensor(batch.lengths)
    ).to(values.device)[batch.targets != IGNORED]
    zeros = torch.zeros(len(batch.lengths), dtype=values.dtype, device=values.device)
    counts = torch.bincount(sequence, minlength=len(batch.lengths))
    return zeros.index_add(0, sequence, values), counts


def against_base(forward: LanguageForward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log π and log π_ref of the answers of a batch of pairs, float32 [P, 2] each.

    π_ref is the frozen base: the same model with its adapter off, without dropout.
    """
    with torch.no_grad(), forward.without_adapter():
        reference, _ = per_sequence(forward.log_probs(batch), batch)
    policy, _ = per_sequence(forward.log_probs(batch), batch)
    return policy.view(-1, 2), reference.view(-1, 2)


def means(forward: LanguageForward, batch: Batch) -> torch.Tensor:
    """Return the mean log-probability of a token of each answer, float32 [P, 2]."""
    sums, counts = per_sequence(forward.log_probs(batch), batch)
    return (sums / counts).view(-1, 2)


def dpo(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the DPO loss of each pair and whether its rewards are in order.

    −(1 − ε) log σ(β Δ) − ε log σ(−β Δ) with Δ = (log π/π_ref)(preferred) − (log π/π_ref)(rejected):
    Rafailov et al., arXiv 2305.18290, equation 7; ε is the conservative variant's share of pairs
    that are labelled the wrong way round (arXiv 2305.18290, appendix; Mitchell 2023).

    Args:
        policy: log π of the answers, float32 [P, 2], the preferred one first.
        reference: The same of the frozen reference.
        beta: Strength of the tie to the reference.
        smoothing: ε, from 0 to below 0.5.

    Returns:
        float32 [P] in nats, and bool [P].
    """
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    loss = -(1 - smoothing) * functional.logsigmoid(margin)
    if smoothing:
        loss = loss - smoothing * functional.logsigmoid(-margin)
    return loss, margin.detach() > 0


def simpo(averages: torch.Tensor, beta: float, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return −log σ(β (m_preferred − m_rejected) − γ) of each pair, and whether it is in order.

    SimPO: Meng et al., arXiv 2405.14734, equation 6. It needs no reference.

    Args:
        averages: Mean log-probability of a token of either answer, float32 [P, 2].
        beta: Scale of the rewards.
        gamma: Margin that the preferred answer is to have.
    """
    margin = beta * (averages[:, 0] - averages[:, 1])
    return -functional.logsigmoid(margin - gamma), margin.detach() > 0


def orpo(averages: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return −m_preferred − λ log σ(log odds(preferred) − log odds(rejected)) of each pair.

    ORPO: Hong et al., arXiv 2403.07691, equations 4 to 6, with odds(y) = p / (1 − p) and p the
    geometric mean of the probabilities of the answer's tokens. It needs no reference.

    Args:
        averages: Mean log-probability of a token of either answer, float32 [P, 2], below 0.
        weight: λ.

    Returns:
        float32 [P] in nats, and bool [P]: whether the preferred answer is the likelier one.
    """
    log_odds = averages - torch.log1p(-torch.exp(averages).clamp(max=1 - 1e-6))
    margin = log_odds[:, 0] - log_odds[:, 1]
    return -averages[:, 0] - weight * functional.logsigmoid(margin), margin.detach() > 0


def kto(
    policy: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the KTO losses of both answers of each pair, added up, and whether they are in order.

    1 − σ(β (r − z)) of the desirable answer and 1 − σ(β (z − r)) of the undesirable one, with
    r = log π/π_ref: Ethayarajh et al., arXiv 2402.01306, equation 8, both λ being 1. z ≥ 0 is the
    mean r of the *other* kind of answers among the pairs given, as in the authors' loss for paired
    rows; no gradient goes through it.

    Args:
        policy: log π of the answers, float32 [P, 2], the preferred one first.
        reference: The same of the frozen reference.
        beta: Aversion to risk, and strength of the tie to the reference.
    """
    rewards = policy - reference
    z_preferred, z_rejected = rewards.detach().mean(0).clamp(min=0)
    desirable = 1 - torch.sigmoid(beta * (rewards[:, 0] - z_rejected))
    undesirable = 1 - torch.sigmoid(beta * (z_preferred - rewards[:, 1]))
    return desirable + undesirable, rewards.detach()[:, 0] > rewards.detach()[:, 1]
