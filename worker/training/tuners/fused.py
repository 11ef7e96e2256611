"""Gains on layers that compute queries, keys and values at once: those of the queries stay at 1."""

from collections.abc import Sequence

import torch
from peft import PeftModel

INTERLEAVED = ("query_key_value",)
"""Last names of fused layers whose outputs are [heads, 3, head size] (GPT-NeoX, BLOOM); those of
all others are queries, keys and values one after another."""


def hold_queries(model: PeftModel, fused: Sequence[str], adapter: str) -> None:
    """Let only the gains of keys and values learn in the layers `fused` (paths of the base)."""
    config = model.get_base_model().config.get_text_config()  # type: ignore[union-attr,operator]
    n_heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // n_heads)
    for path in fused:
        gains = model.get_base_model().get_submodule(path).ia3_l[adapter]  # type: ignore[index]
        assert isinstance(gains, torch.nn.Parameter)
        learns = torch.ones(gains.shape[0], device=gains.device)
        if path.rpartition(".")[2] in INTERLEAVED:
            learns.view(n_heads, -1, head)[:, 0] = 0
        else:
            learns[: n_heads * head] = 0
        gains.register_hook(lambda gradient, mask=learns[:, None]: gradient * mask)
