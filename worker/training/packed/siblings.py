"""Linear layers that read the same input, found by watching one forward pass, taken together."""

from collections.abc import Collection
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from worker.int8 import Int8Linear
from worker.training.packed import layout
from worker.training.packed.lora import LinearGroup
from worker.training.packed.matrices import Pair

PROBE_TOKENS = 8


def groups_by_input(model: PeftModel, beside: Collection[nn.Module] = ()) -> list[list[nn.Module]]:
    """Return the linear layers that can be taken, each with those that read the same tensor.

    Args:
        model: With its adapters attached.
        beside: Layers that are taken without an adapter of their own, if they are frozen.
    """
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args[0])))
        for module in model.modules()
        if can_take(module) or (module in beside and _is_plain(module))
    ]
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    n_calls = {module: 0 for module, _ in calls}
    for module, _ in calls:
        n_calls[module] += 1
    once = [(module, x) for module, x in calls if n_calls[module] == 1 and x.dim() > 1]
    return [
        [module for module, _ in run]
        for _, run in groupby(once, key=lambda call: (id(call[1]), _kind(call[0])))
    ]


def base_layer(module: nn.Module) -> nn.Linear:
    """Return the frozen layer below an adapted module."""
    layer = module.base_layer if isinstance(module, LoraLayer) else module
    assert isinstance(layer, nn.Linear)
    return layer


def can_take(module: nn.Module) -> bool:
    """Tell whether a module is plain LoRA on a linear layer that is not split, tied or merged."""
    if not isinstance(module, LoraLayer) or not isinstance(module, nn.Module):
        return False
    return (
        _is_plain(module.base_layer)
        and not module.merged
        and not any(module.use_dora.values())
        and not any(module.lora_bias.values())
        and not any(getattr(module, "lora_variant", {}).values())
        and all(type(each) is nn.Linear for each in module.lora_A.values())
    )


def _is_plain(layer: nn.Module) -> bool:
    """Tell whether a layer is a frozen linear one of a kind that is known."""
    known = type(layer) in (nn.Linear, Int8Linear) or type(layer).__name__ == "Linear4bit"
    return known and not any(each.requires_grad for each in layer.parameters())


def _kind(module: nn.Module) -> tuple[Any, ...]:
    weight = base_layer(module).weight
    return weight.dtype, weight.device, hasattr(weight, "quant_state")


def pairs_of(modules: list[nn.Module]) -> dict[str, tuple[Pair | None, ...]]:
    """Return for each adapter its matrices in each of the modules."""
    names = {name for each in modules if isinstance(each, LoraLayer) for name in each.lora_A}
    return {name: tuple(_pair(module, name) for module in modules) for name in names}


def _pair(layer: nn.Module, name: str) -> Pair | None:
    if not isinstance(layer, LoraLayer) or name not in layer.lora_A:
        return None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(a, nn.Parameter)
    assert isinstance(b, nn.Parameter)
    p = float(getattr(layer.lora_dropout[name], "p", 0.0))
    return Pair(a, b, float(layer.scaling[name]), p)


class SharedInput:
    """Computes a group at its first layer and hands the others their share."""

    def __init__(self, group: LinearGroup, n_layers: int) -> None:
        self.group = group
        self._n_layers = n_layers
        self._x: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []
        self._n_taken = 0

    def take(self, x: torch.Tensor, index: int, *, training: bool) -> torch.Tensor:
        if self._x is not x:
            # First, since a pass that runs again stops where it has all it needs, perhaps in here.
            whole = self.group(x, training=training)
            self._x, self._n_taken = x, 0
            self._outputs = list(whole.split(self.group.outputs, -1))
        output = self._outputs[index]
        self._n_taken += 1
        if self._n_taken == self._n_layers:
            self._x, self._outputs = None, []
        return output


class Sibling:
    """The forward pass of one layer of a group; PEFT's own outside of a packed pass."""

    def __init__(self, shared: SharedInput, module: nn.Module, index: int) -> None:
        self._shared = shared
        self._module = module
        self._own = module.forward
        self._index = index

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not layout.is_active():
            result: torch.Tensor = self._own(x, *args, **kwargs)
            return result
        return self._shared.take(x, self._index, training=self._module.training)
