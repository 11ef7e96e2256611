"""Which layers of a model are what, by how it is built: no list of model names.

A block is what stands under the first number of a path. Within a block, linear layers under a
module with "att" in its name belong to attention, the others to the feed-forward; each kind ends
with the layer that writes into the residual stream.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from worker.training.tuners.attach import linear_layers

_SIDE_INPUT = re.compile(r"(pos|rel)_")
"""Projections of relative positions (DeBERTa): neither keys of the tokens nor an output."""


@dataclass(slots=True)
class Anatomy:
    """Paths of a model's layers, each list in the order of the blocks.

    `fused` are layers that compute queries, keys and values at once. `norms` are those over the
    residual stream, inside of blocks.
    """

    keys: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    attention_outputs: list[str] = field(default_factory=list)
    feed_forward_outputs: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)


def anatomy(model: PreTrainedModel | PeftModel) -> Anatomy:
    """Return what the layers of a transformer are."""
    found = Anatomy()
    attentions: dict[str, list[str]] = {}
    feed_forwards: dict[str, list[str]] = {}
    for path in linear_layers(model):
        block = _block(path)
        if block is None or _SIDE_INPUT.match(path.rpartition(".")[2]):
            continue
        attention = _attention(path, block)
        if attention is None:
            feed_forwards.setdefault(block, []).append(path)
        else:
            attentions.setdefault(attention, []).append(path)
    for paths in attentions.values():
        *inputs, output = paths
        found.attention_outputs.append(output)
        keys = [path for path in inputs if _is(path, "key")]
        found.keys += keys
        found.values += [path for path in inputs if _is(path, "value")]
        if not keys:
            found.fused += inputs[:1]
    found.feed_forward_outputs = [paths[-1] for paths in feed_forwards.values()]
    found.norms = _norms(model)
    return found


def _block(path: str) -> str | None:
    """Return the path of the block that `path` is in: all of it up to its first number."""
    parts = path.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: at + 1])
    return None


def _attention(path: str, block: str) -> str | None:
    parts = path.removeprefix(f"{block}.").split(".")
    for at, part in enumerate(parts[:-1]):
        if "att" in part.lower():
            return ".".join([block, *parts[: at + 1]])
    return None


def _is(path: str, role: str) -> bool:
    """Tell whether the last name is that of a key or value layer: ``k``, ``k_proj``, ``key`` …"""
    return (
        re.fullmatch(rf"{role[0]}({role[1:]})?(_?(proj|lin))?", path.rpartition(".")[2]) is not None
    )


def _norms(model: PreTrainedModel | PeftModel) -> list[str]:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    width = base.config.get_text_config().hidden_size
    paths = []
    for path, module in base.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = getattr(layer, "weight", None)
        if "Norm" not in type(layer).__name__ or not isinstance(weight, torch.Tensor):
            continue
        is_below = path.endswith(".base_layer")
        if weight.shape == (width,) and _block(path) is not None and not is_below:
            paths.append(path)
    return paths
