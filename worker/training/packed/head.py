"""The language-model head and its loss, for the positions that have a label, a chunk at a time.

Logits of a large vocabulary are the largest tensor of training. Here only a chunk of them exists at
a time and none is kept: the gradient of the hidden states is made in the forward pass.
"""

from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from worker.kernels.products import Term
from worker.training.packed import pool, sums
from worker.training.packed.between import operators_of

CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
"""About what the logits of one chunk take at most; twice as much is not faster on a CPU, and a GPU
reads the whole weight for each."""
BLOCK_BYTES = 16 << 20
"""About what the float32 probabilities take that are made at a time on a GPU."""


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σ −log softmax(W h + b)[target], in nats, and how many targets are the arg-max.

    Args:
        hidden: [N, D], of the positions that have a target.
        weight: [V, D], frozen.
        bias: [V], frozen, or None.
        targets: int64 [N].

    Returns:
        Scalars: float32 with a graph behind it, and int64.
    """
    losses, n_correct = summed_cross_entropies(hidden, weight, bias, targets, [len(targets)])
    return losses[0], n_correct[0]


def summed_cross_entropies(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    sizes: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `summed_cross_entropy` does for each of S runs of neighbouring positions.

    Args:
        hidden: [N, D], of the positions that have a target.
        weight: [V, D], frozen.
        bias: [V], frozen, or None.
        targets: int64 [N].
        sizes: S numbers of positions, N in all.

    Returns:
        float32 [S] with a graph behind it, and int64 [S].
    """
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    losses, n_correct = _SummedCrossEntropies.apply(
        hidden, (weight, bias), targets, sizes, wants_gradient
    )
    return losses, n_correct


def log_probabilities(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Return log softmax(W h + b)[target], in nats, float32 [N], with a graph behind it.

    Arguments are those of `summed_cross_entropy`. The logits of a chunk are made again in the
    backward pass.
    """

    def of_chunk(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(rows, weight, bias)
        return -functional.cross_entropy(logits.float(), labels, reduction="none")

    n_rows = _rows_of_chunk(len(hidden), weight)
    chunks = zip(hidden.split(n_rows), targets.split(n_rows), strict=True)
    found = [checkpoint(of_chunk, rows, labels, use_reentrant=False) for rows, labels in chunks]
    return torch.cat(found)


def _rows_of_chunk(n: int, weight: torch.Tensor) -> int:
    """Return how many of `n` rows make a chunk, so that all chunks are about equal."""
    chunk_bytes = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"])
    most = max(16, chunk_bytes // (weight.element_size() * weight.shape[0]))
    n_chunks = max(1, -(-n // most))
    return -(-n // n_chunks) or 1


class _SummedCrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: tuple[torch.Tensor, torch.Tensor | None],
        targets: torch.Tensor,
        sizes: list[int],
        wants_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = head
        how = sums.of(hidden)
        to_hidden = torch.empty_like(hidden) if wants_gradient else None
        losses, hits = [], []
        n_rows = _rows_of_chunk(len(hidden), weight)
        for start in range(0, hidden.shape[0], n_rows):
            rows = hidden[start : start + n_rows]
            logits = pool.empty(rows, len(rows), len(weight))
            how.add_up([Term(rows, weight.t())], logits, bias=bias)
            labels = targets[start : start + n_rows]
            loss, hit = _losses_(logits, labels, wants_gradient=wants_gradient)
            losses.append(loss)
            hits.append(hit)
            if to_hidden is not None:
                how.add_up([Term(logits, weight)], to_hidden[start : start + n_rows])
        if to_hidden is not None:
            ctx.save_for_backward(to_hidden)
        ctx.sizes = sizes
        runs = torch.cat(losses).split(sizes)
        n_correct = torch.stack([run.sum() for run in torch.cat(hits).split(sizes)])
        ctx.mark_non_differentiable(n_correct)
        return torch.stack([run.sum(dtype=torch.float64) for run in runs]).float(), n_correct

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> Any:
        (to_hidden,) = ctx.saved_tensors
        runs = to_hidden.split(ctx.sizes)
        scaled = [run * g for run, g in zip(runs, gradient.to(to_hidden.dtype), strict=True)]
        to_all = scaled[0] if len(scaled) == 1 else torch.cat(scaled)
        return to_all, None, None, None, None


def _losses_(
    logits: torch.Tensor, labels: torch.Tensor, *, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses, float32 [n], and hits, bool [n], of logits [n, V] and their labels [n].

    With `wants_gradient`, the gradient takes the place of the logits.
    """
    if (own := operators_of(logits)) is not None:
        return own.cross_entropy_(logits, labels, wants_gradient=wants_gradient)
    losses, hits = [], []
    n_block = max(8, BLOCK_BYTES // (4 * logits.shape[1]))
    wanted = labels[:, None]
    for block, own in zip(logits.split(n_block), wanted.split(n_block), strict=True):
        top, best = block.max(-1, keepdim=True)
        shares = torch.softmax(block.float(), -1)
        # −log p(label) = z(best) − z(label) − log p(best), and p(best) never underflows.
        margin = top.float() - block.gather(1, own).float()
        losses.append(margin - shares.gather(1, best).log())
        hits.append(best == own)
        if wants_gradient:
            shares.scatter_add_(1, own, torch.full_like(margin, -1.0))
            block.copy_(shares)  # what is left of the logits is their gradient
    return torch.cat(losses)[:, 0], torch.cat(hits)[:, 0]
