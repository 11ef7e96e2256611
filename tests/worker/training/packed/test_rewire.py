"""Which modules are swapped, and which are left as they are."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.worker.training.tiny import SIZES, attach, lora
from worker.int8 import quantise_
from worker.training.packed import rewire as module
from worker.training.packed.rewire import rewire
from worker.training.packed.siblings import groups_by_input


def llama(**peft: Any) -> Any:
    return attach(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), lora(**peft))


def names(model: Any, modules: list[nn.Module]) -> list[str]:
    by_module = {each: name.rpartition(".")[2] for name, each in model.named_modules()}
    return [by_module[each] for each in modules]


def test_layers_that_read_one_tensor_are_a_group() -> None:
    model = llama()
    groups = [names(model, group) for group in groups_by_input(model)]
    assert groups == 2 * [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_only_adapted_layers_are_taken() -> None:
    model = llama(target_modules=["q_proj", "v_proj"])
    assert [names(model, group) for group in groups_by_input(model)] == 2 * [["q_proj", "v_proj"]]


def test_every_norm_and_gated_layer_of_a_llama_is_swapped() -> None:
    done = rewire(llama(), cache_weights=False)
    assert (done.n_groups, done.n_norms, done.n_gated, done.has_rope) == (8, 5, 2, True)
    assert done.n_fused == 2
    assert done.missed == []


def test_layers_in_8_bits_are_swapped_in_the_dtype_of_their_products() -> None:
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().bfloat16().requires_grad_(False)
    quantise_(base, torch.bfloat16)
    done = rewire(attach(base, lora()), cache_weights=False)
    assert (done.n_groups, done.n_norms, done.n_gated) == (8, 5, 2)


def test_a_norm_of_another_formula_stays() -> None:
    config = GemmaConfig(**SIZES, head_dim=8)
    done = rewire(attach(GemmaForCausalLM(config).eval(), lora()), cache_weights=False)
    assert (done.n_groups, done.n_norms, done.n_gated, done.n_fused) == (8, 0, 0, 0)


def test_adapters_of_another_kind_are_named() -> None:
    model = llama(target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.use_dora["default"] = True
    done = rewire(model, cache_weights=False)
    assert (done.n_groups, done.n_fused) == (4, 1)  # those of the other layer
    assert [name.rpartition("layers.")[2] for name in done.missed] == ["1.self_attn.q_proj"]


def test_a_swap_that_gives_something_else_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @staticmethod
        def apply(x: torch.Tensor, *_: object) -> torch.Tensor:
            return x

    monkeypatch.setattr(module, "RmsNorm", Wrong)
    model = llama()
    assert rewire(model, cache_weights=False).n_norms == 0
    assert all(
        "forward" not in vars(each) for each in model.modules() if "RMSNorm" in type(each).__name__
    )
