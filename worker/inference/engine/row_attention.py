"""Attention of one token a row to the rows of a `RowCache`, by compiled loops.

They read each row to its own end; `scaled_dot_product_attention` reads all rows to the longest's
end, adds a mask, and takes three times as long for eight rows.
"""

from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from worker.inference.engine.kernels.operators import attend
from worker.inference.engine.weights import Numbers

NAME = "tunery_rows"


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
    rows: Rows | None = getattr(key, "tunery_rows", None)
    if (
        rows is None
        # More may have been added to it, such as what tokens lose by their distance.
        or attention_mask is None
        or attention_mask.data_ptr() != rows.mask.data_ptr()
        or options.get("position_bias") is not None
        or query.dtype != key.dtype
        or query.shape[-1] != value.shape[-1]
    ):
        output: torch.Tensor
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend(query, key, value, rows.lengths, scale), None
