"""Shapes read from headers are those of the modules."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from worker.base_models import BaseModelInfo
from worker.base_shape import read_shape


def test_linear_layers_and_the_rest_are_counted_as_the_modules_have_them(
    smollm2: tuple[Path, BaseModelInfo],
) -> None:
    directory, info = smollm2
    shape = read_shape(directory)
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears: dict[str, list[nn.Linear]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            linears.setdefault(path.rpartition(".")[2], []).append(module)
    assert {
        name: (layer.outputs, layer.inputs, layer.count) for name, layer in shape.layers.items()
    } == {
        name: (same[0].out_features, same[0].in_features, len(same))
        for name, same in linears.items()
    }
    assert shape.n_linear + shape.n_other == info.n_parameters
