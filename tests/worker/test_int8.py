"""Bases in 8 bits: how near the weights stay, what is quantised, and that LoRA trains on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from tests.worker.training.tiny import (
    digest_of_base,
    make_examples,
    make_spec,
    make_trainer,
    tiny_llama,
)
from worker.base_models import dequantise_, load_model
from worker.heads import Head
from worker.int8 import Int8Linear, int8_bytes, quantise_


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_each_row_is_within_half_a_step_of_its_largest_over_127() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64) * torch.logspace(-4, 4, 16)[:, None]
    weight[3] = 0
    layer = Int8Linear(weight, None, torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - weight).abs() <= step * 0.5001).all()
    assert torch.equal(layer.weight[3], torch.zeros(64))
    assert {name: each.dtype for name, each in layer.named_buffers()} == {
        "codes": torch.int8,
        "scale": torch.float32,
    }


def test_a_product_and_its_gradient_are_those_of_the_dequantised_weight() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(8, 4), torch.randn(8), torch.float32)
    x = torch.randn(2, 3, 4, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    functional.linear(same, layer.weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


def test_all_linear_layers_are_quantised_but_the_output_and_a_new_head(base: Path) -> None:
    model: Any = load_model(base, precision="int8")
    names = {name.rpartition(".")[2] for name, _ in quantised(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert type(model.lm_head) is nn.Linear
    headed: Any = load_model(base, precision="int8", head=Head("sequence_classification", 3))
    others = [each for each in headed.modules() if type(each) is nn.Linear]
    assert [each.weight.requires_grad for each in others] == [True]


def quantised(model: nn.Module) -> list[tuple[str, Int8Linear]]:
    return [(n, each) for n, each in model.named_modules() if isinstance(each, Int8Linear)]


def test_transposed_layers_are_quantised_too() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()
    model.requires_grad_(False)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    quantise_(model, torch.float32)
    assert len(quantised(model)) == 2 * 4
    after = model(ids).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.02
    dequantise_(model)
    torch.testing.assert_close(model(ids).logits, after)
    assert quantised(model) == []


def test_what_dequantised_weights_would_take_is_known() -> None:
    layers = nn.Sequential(
        Int8Linear(torch.ones(8, 4), None, torch.bfloat16), nn.Linear(4, 4), nn.ReLU()
    )
    assert int8_bytes(layers) == 8 * 4 * 2


@pytest.mark.parametrize("padded", [False, True])
def test_lora_learns_on_8_bits_and_the_base_stays(base: Path, padded: bool) -> None:
    """Packed and padded; both are the steps of the dequantised base."""
    model: Any = load_model(base, precision="int8")
    plain: Any = load_model(base, precision="int8")
    dequantise_(plain)
    losses = []
    for each in (model, plain):
        spec = make_spec(precision={"type": "int8"})
        trainer = make_trainer(spec, train=make_examples(8), model=each, padded=padded)
        before = digest_of_base(trainer.task.model)
        losses.append([trainer.step().train_loss for _ in range(6)])
        assert digest_of_base(trainer.task.model) == before
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
