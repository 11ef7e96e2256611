"""Bottleneck adapters (arXiv 1902.00751, 2005.00247), and what AdaMix (2205.12410) leaves of its.

A small feed-forward after some linear layers, and norms with parameters of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.activations import ACT2FN

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.base import (
    ReadBase,
    integer,
    is_named,
    module_names,
    one_of,
    refuse_unknown,
)
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import Bottleneck, ModuleChange

_KNOWN = frozenset(
    {
        "peft_type",
        "r",
        "activation",
        "target_modules",
        "norm_modules",
        "n_experts",
        # What follows says nothing about the forward pass of a frozen adapter.
        "task_type",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "auto_mapping",
        "inference_mode",
        "std",
        "shares_up",
    }
)
_DOWN, _DOWN_BIAS = "own_down.weight", "own_down.bias"
_UP, _UP_BIAS = "own_up.weight", "own_up.bias"
_WEIGHT, _BIAS = "own_parameters.weight", "own_parameters.bias"


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """The part of the training tuner's ``BottleneckConfig`` that decides the forward pass."""

    r: int
    activation: str
    target_modules: tuple[str, ...] | None
    norm_modules: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        norms = {_WEIGHT, _BIAS} if self.norm_modules else set()
        return frozenset({_DOWN, _DOWN_BIAS, _UP, _UP_BIAS} | norms)

    def targets(self, path: str, shape: ModuleShape) -> bool:
        if shape.kind == "norm":
            return path in self.norm_modules
        return is_named(path, self.target_modules, shape)

    def shapes(self, path: str, shape: ModuleShape) -> dict[str, list[int]]:
        width = shape.out_features
        if shape.kind == "norm":
            return {_WEIGHT: [width]} | ({_BIAS: [width]} if shape.has_bias else {})
        return {
            _DOWN: [self.r, width],
            _DOWN_BIAS: [self.r],
            _UP: [width, self.r],
            _UP_BIAS: [width],
        }

    def change(
        self, path: str, tensors: Mapping[str, torch.Tensor], base: ReadBase
    ) -> ModuleChange:
        """Return a norm's own parameters, or the feed-forward that follows a linear layer."""
        if _WEIGHT in tensors:
            return ModuleChange(weight=tensors[_WEIGHT], bias=tensors.get(_BIAS))
        bottleneck = Bottleneck(
            tensors[_DOWN], tensors[_DOWN_BIAS], tensors[_UP], tensors[_UP_BIAS], self.activation
        )
        return ModuleChange(bottlenecks={"output": bottleneck})


def read(config: Mapping[str, Any]) -> BottleneckConfig:
    """Check the configuration of a bottleneck adapter; raises `AdapterFormatError`."""
    refuse_unknown(config, _KNOWN)
    if config.get("n_experts", 1) != 1:
        raise AdapterFormatError(
            "unsupported_feature", "n_experts is not 1: experts are averaged before serving"
        )
    norms = config.get("norm_modules") or ()
    norm_names = module_names(norms, "norm_modules") if norms else ()
    if norm_names is None:
        raise AdapterFormatError("bad_config", "norm_modules is not a list of module names")
    return BottleneckConfig(
        r=integer(config.get("r"), "r"),
        activation=one_of(config.get("activation"), "activation", ACT2FN),
        target_modules=module_names(config.get("target_modules"), "target_modules"),
        norm_modules=norm_names,
    )
