"""Attention on a CPU: of one token a row to the rows of a `RowCache`, and of short prompts.

Compiled loops read each row to its own end; `scaled_dot_product_attention` reads all rows to the
longest's end, adds a mask, and takes five times as long for eight rows. Prompts of some 90 tokens
take half as long by explicit products as by its kernel.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from worker.kernels import Numbers
from worker.kernels.operators import attend

NAME = "tunery_rows"
EXPLICIT = range(40, 400)
"""Tokens to attend to, where explicit products of a prompt are faster."""


class Rows(NamedTuple):
    """What keys are marked with that are rows without gaps."""

    lengths: Numbers
    mask: torch.Tensor
    """Says the same, for all who do not know the mark."""


def mark(keys: torch.Tensor, rows: Rows) -> None:
    """Say of `keys` that they are `rows`; whatever is made of them is not marked."""
    keys.tunery_rows = rows  # type: ignore[attr-defined]


def use_compiled_attention_(model: PreTrainedModel) -> None:
    """Let a model that attends by `scaled_dot_product_attention` take marked keys by the loops.

    Models whose attention does not go through the interface of transformers stay as they are.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as ``sdpa_attention_forward`` of transformers does, which takes all that is unusual.

    Returns:
        [rows, tokens, heads, d], and no weights.

    Raises:
        ValueError: scores are to be capped.
    """
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    is_usual = (
        not any(options.get(name) is not None for name in ("position_bias", "softcap"))
        and query.dtype == key.dtype
        and query.shape[-1] == value.shape[-1]
    )
    rows: Rows | None = getattr(key, "tunery_rows", None)
    # More may have been added to a mask, such as what tokens lose by their distance.
    if is_usual and rows and _is_same(attention_mask, rows.mask):
        return attend(query, key, value, rows.lengths, scale), None
    if is_usual and query.shape[2] > 1 and key.shape[2] in EXPLICIT:
        is_causal = options.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is not None or (is_causal and query.shape[2] == key.shape[2]):
            return _explicitly(query, key, value, attention_mask, scale), None
    output: torch.Tensor
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output, None


def _is_same(mask: torch.Tensor | None, other: torch.Tensor) -> bool:
    return mask is not None and mask.data_ptr() == other.data_ptr()


def _explicitly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Return attention [rows, tokens, heads, d]; without a mask, to what is not after a token."""
    n_rows, n_heads, n_tokens, d = query.shape
    n_shared, width = key.shape[1:3]
    queries = (query * scale).reshape(n_rows, n_shared, -1, d)
    scores = torch.matmul(queries, key.transpose(-1, -2)).view(n_rows, n_heads, n_tokens, width)
    if mask is None:
        scores.masked_fill_(_after(n_tokens, width), -torch.inf)
    elif mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores += mask
    shares = torch.softmax(scores, -1).view(n_rows, n_shared, -1, width)
    return torch.matmul(shares, value).view(n_rows, n_heads, n_tokens, d).transpose(1, 2)


@lru_cache(8)
def _after(n_tokens: int, width: int) -> torch.Tensor:
    """Return what is after each of the last `n_tokens` tokens, [tokens, width]."""
    return torch.ones(n_tokens, width, dtype=torch.bool).triu(width - n_tokens + 1)
