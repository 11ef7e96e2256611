"""Stacked frozen weights: the same numbers, held once."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

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


def test_full_weights_are_stacked_and_the_layers_become_views() -> None:
    layers = [nn.Linear(4, outputs).requires_grad_(False) for outputs in (3, 2)]
    expected = torch.cat([layer.weight for layer in layers])
    frozen = FrozenWeight(layers, {}, cache=False)
    assert torch.equal(frozen.get(), expected)
    assert frozen.outputs == [3, 2]
    places = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert places == {frozen.get().untyped_storage().data_ptr()}
    assert torch.equal(torch.cat([layer.weight for layer in layers]), expected)
    assert frozen.bias is not None
    assert torch.equal(frozen.bias, torch.cat([layer.bias for layer in layers]))


def test_a_layer_without_bias_adds_nothing() -> None:
    layers = [nn.Linear(4, 3, bias=False), nn.Linear(4, 2)]
    frozen = FrozenWeight(layers, {}, cache=False)
    assert frozen.bias is not None
    assert frozen.bias.tolist()[:3] == [0, 0, 0]
    assert FrozenWeight(layers[:1], {}, cache=False).bias is None


@pytest.mark.parametrize("cache", [False, True])
def test_nf4_weights_are_those_of_their_layers(cache: bool) -> None:
    layers = [quantised(64, 128, 0), quantised(64, 64, 1)]
    weights = [layer.weight for layer in layers]
    expected = torch.cat(
        [bnb.functional.dequantize_4bit(each.data, each.quant_state) for each in weights]
    )
    scratch: dict[torch.Size, torch.Tensor] = {}
    frozen = FrozenWeight(layers, scratch, cache=cache)
    assert torch.equal(frozen.get(), expected)
    assert frozen.get().dtype == torch.bfloat16
    assert len(scratch) == (0 if cache else 1), "one buffer serves all groups of a shape"
    assert layers[0].weight.dtype == torch.uint8, "the layers stay four bits"
