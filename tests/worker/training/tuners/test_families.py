"""(IA)³ where the paper has it, in every family: its layers, its gains, what a merge gives."""

from typing import Any

import pytest
import torch
import transformers

from tests.worker.training.tiny import attach
from worker.training.model import trainable_parameters

D, FF, N = 64, 256, 3
LLAMA_LIKE = {"num_key_value_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str], int]] = {
    "bert": ("MaskedLM", {}, {"key", "value", "output.dense"}, N * (2 * D + FF)),
    "roberta": ("MaskedLM", {}, {"key", "value", "output.dense"}, N * (2 * D + FF)),
    "deberta-v2": (
        "MaskedLM",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        {"key_proj", "value_proj", "output.dense"},
        N * (2 * D + FF),
    ),
    "opt": (
        "CausalLM",
        {"ffn_dim": FF, "word_embed_proj_dim": D},
        {"k_proj", "v_proj", "fc2"},
        N * (2 * D + FF),
    ),
    "llama": (
        "CausalLM",
        {"num_key_value_heads": 4},
        {"k_proj", "v_proj", "down_proj"},
        N * (2 * D + FF),
    ),
    "qwen2": (
        "CausalLM",
        {"num_key_value_heads": 2},
        {"k_proj", "v_proj", "down_proj"},
        N * (2 * D // 2 + FF),
    ),
    # Fused: gains for the queries too, which are held at 1.
    "gpt2": ("CausalLM", {}, {"c_attn", "mlp.c_proj"}, N * (3 * D + 4 * D)),
    "t5": (
        "Seq2SeqLM",
        {"d_model": D, "d_ff": FF, "d_kv": 16, "num_layers": N, "num_heads": 4, "vocab_size": 97},
        {"k", "v", "wo"},
        N * (2 * D + FF) + N * (4 * D + FF),
    ),
}
IDS = torch.arange(3, 15)[None]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_has_the_papers_targets_and_the_papers_number_of_gains(family: str) -> None:
    """Section 3.2 of the methods' specification: 1,152 for d = 64, ff = 256, L = 3."""
    kind, more, targets, n_gains = FAMILIES[family]
    sizes = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": N}
    sizes |= {"num_attention_heads": 4, "vocab_size": 97, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, **(sizes | more if family != "t5" else more))
    torch.manual_seed(0)
    base = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    inputs = {"decoder_input_ids": IDS} if config.is_encoder_decoder else {}
    with torch.no_grad():
        expected = base(input_ids=IDS, **inputs).logits
    model: Any = attach(base.requires_grad_(False), {"type": "ia3"}).eval()
    gains = trainable_parameters(model)
    layers = [name.removesuffix(".ia3_l") for name in gains]
    assert all(any(f".{layer}".endswith(f".{end}") for end in targets) for layer in layers)
    assert not any("attention.output.dense" in layer for layer in layers)
    assert sum(each.numel() for each in gains.values()) == n_gains
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, **inputs).logits, expected)
        for each in gains.values():
            each.mul_(1 + 0.1 * torch.randn_like(each))
        unmerged = model(input_ids=IDS, **inputs).logits
        merged = model.merge_and_unload()(input_ids=IDS, **inputs).logits
    assert float((unmerged - expected).norm() / expected.norm()) > 1e-3
    assert float((merged - unmerged).norm() / unmerged.norm()) <= 1e-6
