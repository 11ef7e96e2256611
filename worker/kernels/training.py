"""The loops that training needs as operators on tensors of a CPU, in bfloat16 or float32."""

from collections.abc import Sequence

import numpy as np
import torch

from worker.kernels import Numbers, causal, gemm, gradients, heads, masks, pairs, tiles
from worker.kernels.operators import by_token, loops
from worker.kernels.team import bits_of

Turns = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [tokens, d] of the tokens' positions (RoPE), contiguous."""

_RESCALE_BACK = loops(gradients.rescale_back_bfloat16, gradients.rescale_back_float32)
_GATE_BACK = loops(gradients.gate_back_bfloat16, gradients.gate_back_float32)
_CROSS_ENTROPY = loops(gradients.cross_entropy_bfloat16, gradients.cross_entropy_float32)
_SPLIT = loops(heads.split_bfloat16, heads.split_float32)
_JOIN = loops(heads.join_bfloat16, heads.join_float32)
_SOFTMAX = loops(heads.causal_softmax_bfloat16, heads.causal_softmax_float32)
_SOFTMAX_BACK = loops(heads.causal_softmax_back_bfloat16, heads.causal_softmax_back_float32)
_ALL = (_RESCALE_BACK, _GATE_BACK, _CROSS_ENTROPY, _SPLIT, _JOIN, _SOFTMAX, _SOFTMAX_BACK)
_ZERO = {2: masks.zero_16, 4: masks.zero_32, 8: masks.zero_64}
"""By the size of an element in bytes."""


def compile_(dtype: torch.dtype) -> None:
    """Compile what tensors of `dtype` need, rather than in the first step."""
    for each in _ALL:
        each[dtype].address  # noqa: B018
    masks.draw.address  # noqa: B018
    if dtype == torch.bfloat16 and tiles.is_supported():
        for loop in (gemm.multiply_sums, *pairs.ALL, *causal.ALL):
            loop.address  # noqa: B018


def rescale_back(  # noqa: PLR0913 - what `rescale` was given and made
    gradient: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    factors: torch.Tensor,
    other: torch.Tensor | None,
    *,
    out: torch.Tensor,
    is_bare: bool = False,
) -> torch.Tensor:
    """Return the gradient of the input of ``operators.rescale``, plus another.

    Args:
        gradient: Of its result, contiguous [..., d].
        y: Its result. No number of `weight` may be 0 or tiny unless it `is_bare`.
        weight: [d].
        factors: What it multiplied each token with, float32.
        other: What is added, contiguous [..., d], or None.
        out: Contiguous [..., d], is filled and returned.
        is_bare: Whether y is given as it was before it was multiplied with `weight`.
    """
    d = y.shape[-1]
    n_tokens = y.numel() // d
    tensors = (out, gradient, y, other, weight, factors)
    pointers = [0 if each is None else each.data_ptr() for each in tensors]
    _RESCALE_BACK[y.dtype]([*pointers, n_tokens, d, int(is_bare)], n_tokens)
    return out


def gated_back(
    gradient: torch.Tensor, both: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Make the gradient of the input of ``operators.gated``, and its result once more.

    Args:
        gradient: Of its result, contiguous [tokens, d].
        both: Gate and value side by side, contiguous [tokens, 2 · d].
        out: Is filled with the gradient [tokens, 2 · d] and the result [tokens, d], contiguous.
    """
    n_tokens, d = gradient.shape
    to_both, y = out
    pointers = [*_halves(to_both, d), y.data_ptr(), gradient.data_ptr(), *_halves(both, d)]
    numbers = [*pointers, n_tokens, d, by_token(both), by_token(to_both)]
    _GATE_BACK[gradient.dtype](numbers, n_tokens)


def _halves(both: torch.Tensor, d: int) -> tuple[int, int]:
    return both.data_ptr(), both.data_ptr() + d * both.element_size()


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, *, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return −log softmax(logits)[label] in nats and whether that is the first largest.

    Args:
        logits: Contiguous [n, d]; their gradient takes their place if it is wanted.
        labels: int64 [n].
        wants_gradient: Whether it is.

    Returns:
        float32 [n] and bool [n].

    Raises:
        IndexError: a label is no number of a logit.
    """
    n, d = logits.shape
    labels = labels.contiguous()
    if n and not (int(labels.min()) >= 0 and int(labels.max()) < d):
        raise IndexError(
            f"There are labels from {labels.min()} to {labels.max()}, but {d} logits from 0 on."
        )
    losses = torch.empty(n, dtype=torch.float32)
    hits = torch.empty(n, dtype=torch.bool)
    pointers = [each.data_ptr() for each in (logits, labels, losses, hits)]
    _CROSS_ENTROPY[logits.dtype]([*pointers, n, d, int(wants_gradient)], n)
    return losses, hits


class Rows:
    """Neighbouring rows of a pass, of about one length.

    Args:
        spans: The first token of each, and the one after its last.
    """

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.firsts: Numbers = np.array([start for start, _ in spans])
        self.lengths: Numbers = np.array([end - start for start, end in spans])
        longest = int(self.lengths.max())
        self.n = longest + longest % 2  # in products, numbers in pairs are fastest

    def __len__(self) -> int:
        return len(self.firsts)


def split_heads(
    tokens: torch.Tensor, rows: Rows, turns: Turns | None, scale: float, *, out: torch.Tensor
) -> torch.Tensor:
    """Return the heads of some rows side by side, times `scale`, with positions if there are any.

    Args:
        tokens: [all tokens, heads, d] with the numbers of a head one after the other.
        rows: Which.
        turns: Cosines and sines of all tokens, or None.
        scale: Factor of all.
        out: Contiguous [rows, heads, n, d], is filled, with 0 after the ends of rows, and returned.

    Raises:
        ValueError: the numbers of a head lie apart.
    """
    _SPLIT[tokens.dtype](_told(out, tokens, rows, turns, scale), out.shape[0] * out.shape[1])
    return out


def join_heads(
    split: torch.Tensor, rows: Rows, turns: Turns | None, scale: float, *, out: torch.Tensor
) -> None:
    """Do what `split_heads` does backwards: for results, and with positions for gradients.

    Args:
        split: Contiguous [rows, heads, n, d].
        rows: Which.
        turns: Cosines and sines of all tokens, or None.
        scale: Factor of all.
        out: [all tokens, heads, d] with the numbers of a head one after the other; what is there of
            the rows is filled.
    """
    _JOIN[split.dtype](_told(split, out, rows, turns, scale), rows.n)


def _told(
    split: torch.Tensor, tokens: torch.Tensor, rows: Rows, turns: Turns | None, scale: float
) -> list[int]:
    n_rows, n_heads, n, d = split.shape
    if tokens.stride(2) != 1:
        raise ValueError("The numbers of a head do not follow each other.")
    return [
        *(split.data_ptr(), tokens.data_ptr()),
        *(rows.firsts.ctypes.data, rows.lengths.ctypes.data),
        *((0, 0) if turns is None else (each.data_ptr() for each in turns)),
        *(n_rows, n_heads, n, d, tokens.stride(0), tokens.stride(1), bits_of(scale)),
    ]


def causal_softmax_(scores: torch.Tensor) -> torch.Tensor:
    """Make probabilities of contiguous scores [heads, queries, n], in place; return them.

    Queries are at positions 0 to n − 1 again and again, and see keys up to their own.
    """
    n = scores.shape[-1]
    n_rows = scores.numel() // n
    _SOFTMAX[scores.dtype]((scores.data_ptr(), n_rows, n), n_rows)
    return scores


def causal_softmax_back_(gradient: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Make the gradient of scores of that of `causal_softmax_`'s result, in place; return it."""
    n = shares.shape[-1]
    n_rows = shares.numel() // n
    numbers = (gradient.data_ptr(), shares.data_ptr(), n_rows, n)
    _SOFTMAX_BACK[shares.dtype](numbers, n_rows)
    return gradient


def draw_masks(rates: Sequence[float], n_rows: int, width: int, seed: int) -> torch.Tensor:
    """Choose elements to drop: of tensor t each on its own, with probability ``rates[t]``.

    Args:
        rates: In [0, 1), to 32 bits.
        n_rows: Rows of each tensor.
        width: Elements of each row.
        seed: From 0 to 2⁶³ − 1.

    Returns:
        int32 [tensors, rows, words]: bit j of word w is 1 if element ``32 w + j`` of the row is
        kept.
    """
    n_words = -(-width // masks.WORD_BITS)
    found = torch.empty(len(rates), n_rows, n_words, dtype=torch.int32)
    limits = [round(rate * 2**32) for rate in rates]
    masks.draw([found.data_ptr(), len(rates), n_rows, n_words, seed, *limits], n_rows)
    return found


def zero_dropped_(x: torch.Tensor, mask: torch.Tensor) -> None:
    """Set to zero what `mask` [rows, words], of `draw_masks`, drops of a contiguous `x`, in place.

    Raises:
        ValueError: `x` has other rows, or its elements are not in one piece.
    """
    n_rows, n_words = mask.shape
    if not x.numel():
        return
    width = x.numel() // n_rows if n_rows else 0
    if not x.is_contiguous() or -(-width // masks.WORD_BITS) != n_words or x.numel() % n_rows:
        raise ValueError(f"A mask {tuple(mask.shape)} does not belong to {tuple(x.shape)}.")
    _ZERO[x.element_size()]((x.data_ptr(), mask.data_ptr(), n_rows, width), n_rows)
