"""Layers taken apart by what they are, and models that are refused with the reason."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from models.errors import InvalidRequestError
from tests.worker.training.tiny import SIZES
from worker.training.reversible import blocks
from worker.training.reversible.blocks import Call

SPLITS = ("bert", "deberta-v2", "gemma3_text", "gpt2", "llama", "modernbert")
PARALLEL = ("gpt_neox", "phi")


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    kinds = {"cls_token_id": 1, "sep_token_id": 2} if family == "modernbert" else {}
    config = AutoConfig.for_model(family, **{**SIZES, **kinds}, initializer_range=0.2)
    return AutoModel.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", [*SPLITS, *PARALLEL])
def test_the_one_stack_of_layers_is_found_whatever_it_is_called(family: str) -> None:
    layers = blocks.transformer_layers(tiny(family))
    assert len(layers) == SIZES["num_hidden_layers"]
    assert [path.rpartition(".")[2] for path in layers] == ["0", "1"]


@pytest.mark.parametrize("family", SPLITS)
def test_attention_then_feed_forward_is_the_layer(family: str) -> None:
    _, split_error = blocks.probe(tiny(family))
    assert split_error is None


@pytest.mark.parametrize("family", PARALLEL)
def test_layers_whose_blocks_run_side_by_side_do_not_split(family: str) -> None:
    _, split_error = blocks.probe(tiny(family))
    assert "meft3 needs layers" in str(split_error)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bart", "a decoder"), ("albert", "0 stacks of 2 layers"), ("opt", "no feed-forward")],
)
def test_models_that_do_not_fit_are_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        blocks.probe(tiny(family))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_beside_the_feed_forward_reads_its_input(family: str) -> None:
    """With an extra of 0 nothing changes; in a pre-norm layer another is simply added."""
    model = tiny(family)
    [layer, _] = blocks.transformer_layers(model).values()
    seen: list[torch.Tensor] = []
    ramp = torch.linspace(-1, 1, SIZES["hidden_size"])

    def extra(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros_like(x) if len(seen) == 1 else ramp.expand_as(x)

    x = torch.randn(1, 4, SIZES["hidden_size"])
    call = Call()
    if family == "llama":
        positions = torch.arange(4)[None]
        call = Call(kwargs={"position_embeddings": model.rotary_emb(x, positions)})
    with torch.no_grad():
        plain = blocks.whole(layer, call, x)
        with blocks.beside_feed_forward(layer, extra):
            assert torch.equal(blocks.whole(layer, call, x), plain)
            changed = blocks.whole(layer, call, x)
        assert torch.equal(blocks.whole(layer, call, x), plain)
        attended = blocks.attention_block(layer, call, x)
    if family == "llama":
        torch.testing.assert_close(changed, plain + ramp)
        norm: Any = layer.post_attention_layernorm
        torch.testing.assert_close(seen[0], norm(attended))
    else:
        torch.testing.assert_close(seen[0], attended)
        assert not torch.allclose(changed, plain)


def test_what_is_after_the_attention_changes_its_projection() -> None:
    [layer, _] = blocks.transformer_layers(tiny("bert")).values()
    x = torch.randn(1, 4, SIZES["hidden_size"])
    projection = blocks.attention_projection(layer)
    assert projection is layer.attention.output.dense  # type: ignore[union-attr]
    with torch.no_grad():
        plain = blocks.attention_block(layer, Call(), x)
        with blocks.after_attention(layer, torch.neg):
            gone = blocks.attention_block(layer, Call(), x)
    norm = layer.attention.output.LayerNorm  # type: ignore[union-attr]
    torch.testing.assert_close(gone, norm(x))  # type: ignore[operator]
    assert not torch.allclose(gone, plain)


def test_a_probe_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    model = AutoModelForCausalLM.from_config(config).train()
    blocks.probe(model)
    assert model.training
    layers = blocks.transformer_layers(model).values()
    assert not any(layer._forward_hooks for layer in layers)
    assert not any("forward" in module.__dict__ for module in model.modules())
