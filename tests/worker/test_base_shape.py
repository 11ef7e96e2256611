"""Shapes read from headers are those of the modules."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

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


def test_blocks_norms_and_biases_are_counted(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=3, n_head=2, n_inner=48, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    parameters = dict(model.named_parameters())
    assert (shape.n_blocks, shape.width) == (3, 32)
    fused = shape.layers["c_attn"]  # stored [in, out]
    assert (fused.outputs, fused.inputs, fused.count) == (96, 32, 3)
    assert shape.n_norms == 3 * 2 * 2 * 32
    assert shape.n_biases == sum(p.numel() for n, p in parameters.items() if n.endswith(".bias"))
    assert shape.n_linear + shape.n_other == sum(p.numel() for p in parameters.values())
