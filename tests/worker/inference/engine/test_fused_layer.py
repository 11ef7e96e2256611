"""Layers that are taken over compute what they did; others are known and stay."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
)

from tests.worker.inference.tiny import tiny_llama
from worker.inference.engine.fused_layer import fuse_
from worker.inference.engine.lora import BaseLayers
from worker.inference.engine.packed_linear import JointPart, is_supported, pack_
from worker.inference.engine.row_attention import use_compiled_attention_
from worker.inference.engine.runner import cache_argument
from worker.inference.engine.slots import Slots
from worker.inference.engine.weights import AdapterWeights, ModuleChange

IDS = torch.arange(24).view(2, 12) % 250
BFLOAT16 = pytest.mark.skipif(not is_supported(), reason="no products in bfloat16 here")


def make(family: str, **changes: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model.eval().requires_grad_(False)


def fused(model: PreTrainedModel) -> tuple[int, Slots]:
    """Take over the layers of `model`; return how many there were."""
    layers = BaseLayers(model)
    use_compiled_attention_(model)
    slots = Slots(layers.shapes, 3, torch.empty(0), model.dtype)
    layers.attach(slots)
    return fuse_(layers.transformer_layers, slots), slots


@torch.inference_mode()
def logits(model: Any, cut: int | None = None) -> torch.Tensor:
    """Of `IDS`, fed at once or in two pieces."""
    if cut is None:
        found: torch.Tensor = model(input_ids=IDS).logits
        return found
    name, cache = cache_argument(model), DynamicCache(config=model.config)
    pieces = [
        model(input_ids=ids, use_cache=True, **{name: cache}).logits
        for ids in (IDS[:, :cut], IDS[:, cut:])
    ]
    return torch.cat(pieces, 1)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}),
        ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
    ids=["llama", "biases", "one key head", "mistral", "qwen2", "qwen3"],
)
def test_layers_of_llamas_kind_are_taken_over_and_compute_the_same(
    family: str, changes: dict[str, Any]
) -> None:
    model = make(family, **changes)
    expected, in_pieces = logits(model), logits(model, 7)
    n_fused, slots = fused(model)
    assert n_fused == 2
    slots.use([None, None])
    assert distance(logits(model), expected) < 1e-5
    assert distance(logits(model, 7), in_pieces) < 1e-5
    assert distance(logits(model, 11), in_pieces) < 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmo2", {}),
        ("gemma", {"head_dim": 16}),
        ("granite", {"residual_multiplier": 0.5}),
        ("llama", {"hidden_act": "gelu"}),
        ("phi", {}),
    ],
    ids=["norms of all heads", "other norms", "a smaller residual", "another gate", "other parts"],
)
def test_other_layers_stay_as_they_are(family: str, changes: dict[str, Any]) -> None:
    model = make(family, **changes)
    expected = logits(model)
    n_fused, slots = fused(model)
    assert n_fused == 0
    slots.use([None, None])
    assert distance(logits(model), expected) < 1e-5


def test_a_layer_that_breaks_its_word_for_one_number_is_found_out() -> None:
    model: Any = make("llama")
    original = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.001
    assert fused(model)[0] == 1


def draw(slots: Slots, name: str, seed: int, *, gains: bool = False) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for path, number in slots.numbers.items():
        buffers = slots.layers[path]
        shape = buffers._shape
        if shape.kind != "linear" or shape.is_output or number % 3 == seed % 3:
            continue
        changes[path] = ModuleChange(
            torch.randn(4 + seed, shape.in_features, generator=generator) * 0.2,
            torch.randn(shape.out_features, 4 + seed, generator=generator) * 0.2,
            gain=torch.rand(shape.out_features, generator=generator) + 0.5 if gains else None,
        )
    return slots.prepare(AdapterWeights(name, changes))


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BFLOAT16)], ids=str
)
def test_rows_get_what_their_adapters_make_of_them_with_and_without_more_than_low_rank(
    dtype: torch.dtype,
) -> None:
    plain: Any = tiny_llama()
    plain.to(dtype)
    model = copy.deepcopy(plain)
    layers = BaseLayers(plain)
    slots = Slots(layers.shapes, 3, torch.empty(0), dtype)
    layers.attach(slots)
    pack_(model)
    n_fused, own = fused(model)
    assert n_fused == 2
    if dtype == torch.bfloat16:
        parts = [each for each in model.modules() if isinstance(each, JointPart)]
        assert len(parts) == 2 * 5
    adapters = [draw(own, "1", 1), draw(own, "2", 2), draw(own, "3", 3, gains=True)]
    one, two, more = adapters
    for rows in ([one, None], [one, two], [more, two], [None, more], [two, two]):
        for each in (slots, own):
            each.use(rows)
        assert own.adds_only == (more not in rows)
        found, expected = logits(model), logits(plain)
        assert distance(found, expected) < (3e-2 if dtype == torch.bfloat16 else 1e-5)
        other = [None, None]
        slots.use(other)
        assert distance(logits(plain), expected) > 0.05, "they do something"
