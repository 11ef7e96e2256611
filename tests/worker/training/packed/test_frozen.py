"""Frozen weights: the layer's own numbers, held once."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from worker.int8 import Int8Linear
from worker.training.packed.frozen import FrozenWeight


def quantised(inputs: int, outputs: int, seed: int) -> Any:
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(
        inputs,
        outputs,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        compress_statistics=True,
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(outputs, inputs).bfloat16(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
    )
    return layer.to("cpu")


def test_a_full_weight_is_the_layers_own_tensor() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    frozen = FrozenWeight(layer, cache=False)
    assert frozen.get().data_ptr() == layer.weight.data_ptr()
    assert frozen.bias is not None
    assert torch.equal(frozen.bias, layer.bias)
    assert (frozen.outputs, frozen.inputs) == (3, 4)
    assert FrozenWeight(nn.Linear(4, 3, bias=False), cache=False).bias is None


@pytest.mark.parametrize("cache", [False, True])
def test_an_nf4_weight_is_that_of_its_layer(cache: bool) -> None:
    layer = quantised(64, 128, 0)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    frozen = FrozenWeight(layer, cache=cache)
    assert torch.equal(frozen.get(), expected)
    assert frozen.get().dtype == torch.bfloat16
    first, second = frozen.get(), frozen.get()
    assert (first is second) is cache
    assert layer.weight.dtype == torch.uint8, "the layer stays four bits"


@pytest.mark.parametrize("cache", [False, True])
def test_an_int8_weight_is_that_of_its_layer(cache: bool) -> None:
    layer = Int8Linear(torch.randn(128, 64), torch.ones(128), torch.float32)
    frozen = FrozenWeight(layer, cache=cache)
    assert torch.equal(frozen.get(), layer.weight)
    first, second = frozen.get(), frozen.get()
    assert (first is second) is cache
    assert frozen.bias is not None
    assert (frozen.outputs, frozen.inputs) == (128, 64)
