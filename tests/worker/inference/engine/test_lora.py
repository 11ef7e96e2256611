"""Wrapped linear layers: the same numbers as PEFT, and the base untouched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.worker.inference.tiny import tiny_llama
from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.lora import BaseLayers
from worker.inference.engine.slots import Slots
from worker.inference.engine.weights import AdapterWeights, ModuleChange

# peft 0.21.2 reads an attribute that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.tensor([[5, 9, 200, 31, 77, 4, 250, 18]])


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ).eval()


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "the head": {"target_modules": ["lm_head", "gate_proj"]},
    "rank-stabilised": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"],
        "rank_pattern": {
            "layers.0.self_attn.q_proj": 2,
            "q_proj": 8,
            "^model.layers.1.mlp.up_proj": 3,
        },
        "alpha_pattern": {"k_proj": 5, "layers.1.self_attn.o_proj": 40},
    },
    "patterns, rank-stabilised": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"k_proj": 5},
        "use_rslora": True,
    },
}


COMPILED = pytest.mark.parametrize("compiled", [None, torch.float32], ids=["by torch", "compiled"])


@COMPILED
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_are_those_of_peft_alone_and_beside_the_base(
    options: dict[str, Any], tmp_path: Path, compiled: torch.dtype | None
) -> None:
    peft_model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=12, **options)).eval()
    randomise(peft_model)
    peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    expected = logits(peft_model)

    model = tiny_llama()
    base = logits(model)
    slots, adapter = use(model, tmp_path, compiled)
    assert (logits(model) - expected).norm() / expected.norm() < 1e-5
    assert (base - expected).norm() / expected.norm() > 0.05
    slots.use([adapter, None])
    with torch.inference_mode():
        both = model(input_ids=IDS.expand(2, -1)).logits
    assert (both[0] - expected).norm() / expected.norm() < 1e-5
    torch.testing.assert_close(both[1:], base)


def use(
    model: PreTrainedModel, directory: Path, compiled: torch.dtype | None = None
) -> tuple[Slots, AdapterWeights]:
    """Wrap `model` and let every row of the next pass use the adapter in `directory`."""
    layers = BaseLayers(model)
    slots = Slots(layers.shapes, 1, torch.empty(0, dtype=model.dtype), compiled)
    layers.attach(slots)
    adapter = read_adapter(directory, "d" * 40, layers.shapes).weights(layers.read)
    adapter = slots.prepare(adapter)
    slots.use([adapter])
    return slots, adapter


ROWS = ["base", "2", "0", "2", "1", "2", "base"]


@pytest.mark.parametrize(
    "ranks", [(4, 4, 4), (4, 8, 16), (2, 3, 8)], ids=["one rank", "other ranks", "odd ranks"]
)
@pytest.mark.parametrize("n_tokens", [1, 5])
@COMPILED
def test_rows_of_one_pass_are_what_they_are_alone(
    ranks: tuple[int, ...], n_tokens: int, compiled: torch.dtype | None
) -> None:
    model = tiny_llama()
    layers = BaseLayers(model)
    slots = Slots(layers.shapes, 3, torch.empty(0), compiled)
    layers.attach(slots)
    draw = torch.Generator().manual_seed(5)
    adapters: dict[str, AdapterWeights | None] = {"base": None}
    for name, rank in enumerate(ranks):
        changes = {
            path: ModuleChange(
                torch.randn(rank, shape.in_features, generator=draw) * 0.2,
                torch.randn(shape.out_features, rank, generator=draw) * 0.2,
            )
            for path, shape in layers.shapes.items()
            if shape.kind == "linear" and not shape.is_output
        }
        adapters[str(name)] = slots.prepare(AdapterWeights(str(name), changes))
    ids = torch.randint(256, (len(ROWS), n_tokens), generator=draw)
    with torch.inference_mode():
        slots.use([adapters[name] for name in ("0", "1", "2")])
        slots.use([adapters[name] for name in ROWS])
        together = model(input_ids=ids).logits
        for row, asked in enumerate(ROWS):
            slots.use([adapters[asked]])
            alone = model(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_conv1d_layers_of_gpt2_are_served_like_peft(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    peft_model = get_peft_model(tiny_gpt2(), config).eval()
    randomise(peft_model)
    peft_model.save_pretrained(str(tmp_path))
    expected = logits(peft_model)

    model = tiny_gpt2()
    use(model, tmp_path)
    assert (logits(model) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_adapter_the_wrapped_model_is_the_base_to_the_bit(dtype: torch.dtype) -> None:
    model = tiny_llama()
    torch.nn.Module.to(model, dtype)
    expected = logits(model)
    layers = BaseLayers(model)
    layers.attach(Slots(layers.shapes, 2, torch.empty(0, dtype=dtype)))
    assert torch.equal(logits(model), expected)


def test_every_linear_layer_is_wrapped_once_and_the_head_is_known() -> None:
    model = tiny_llama()
    shapes = BaseLayers(model).shapes
    kinds = [shape.kind for shape in shapes.values()]
    assert [kinds.count(kind) for kind in ("linear", "norm", "layer")] == [2 * 7 + 1, 2 * 2 + 1, 2]
    assert [path for path, shape in shapes.items() if shape.is_output] == ["lm_head"]
    gate = shapes["model.layers.1.mlp.gate_proj"]
    assert (gate.in_features, gate.out_features) == (64, 96)


def test_a_model_that_goes_past_the_wrapper_fails_instead_of_losing_the_adapter() -> None:
    model = tiny_llama()
    BaseLayers(model)
    with pytest.raises(AttributeError, match="weight"):
        _ = model.lm_head.weight


def test_the_base_is_read_as_out_times_in_whatever_its_layout() -> None:
    gpt2: Any = tiny_gpt2()
    attention = gpt2.transformer.h[0].attn.c_attn
    layer = BaseLayers(gpt2).read("transformer.h.0.attn.c_attn")
    assert torch.equal(layer.weight, attention.weight.T)
    assert layer.bias is not None
    assert BaseLayers(tiny_llama()).read("lm_head").bias is None
