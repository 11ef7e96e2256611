"""IA3 (arXiv 2205.05638): vectors that rescale what layers give, or what feed-forward ones get."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.base import ReadBase, is_named, module_names, refuse_unknown
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import ModuleChange

_KNOWN = frozenset(
    {
        "peft_type",
        "target_modules",
        "feedforward_modules",
        # What follows says nothing about the forward pass of a frozen adapter.
        "task_type",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "auto_mapping",
        "inference_mode",
        "fan_in_fan_out",
        "init_ia3_weights",
    }
)
_VECTOR = "ia3_l"


@dataclass(frozen=True, slots=True)
class Ia3Config:
    """The part of PEFT's ``IA3Config`` that decides the forward pass."""

    target_modules: tuple[str, ...] | None
    feedforward_modules: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset({_VECTOR})

    def targets(self, path: str, shape: ModuleShape) -> bool:
        return is_named(path, self.target_modules, shape)

    def shapes(self, path: str, shape: ModuleShape) -> dict[str, list[int]]:
        if self._is_feedforward(path):
            return {_VECTOR: [1, shape.in_features]}
        return {_VECTOR: [shape.out_features, 1]}

    def change(
        self, path: str, tensors: Mapping[str, torch.Tensor], base: ReadBase
    ) -> ModuleChange:
        """Return the vector as a gain on the input, or on the output with its bias (PEFT)."""
        vector = tensors[_VECTOR].flatten()
        return (
            ModuleChange(gain_in=vector)
            if self._is_feedforward(path)
            else ModuleChange(gain=vector)
        )

    def _is_feedforward(self, path: str) -> bool:
        # PEFT's own rule (IA3Model._check_target_module_feedforward): the path's end, no dot asked.
        return any(path.endswith(name) for name in self.feedforward_modules)


def read(config: Mapping[str, Any]) -> Ia3Config:
    """Check the configuration of an IA3 adapter; raises `AdapterFormatError`."""
    refuse_unknown(config, _KNOWN)
    feedforward = config.get("feedforward_modules") or ()
    names = module_names(feedforward, "feedforward_modules") if feedforward else ()
    if names is None:
        raise AdapterFormatError("bad_config", "feedforward_modules is not a list of module names")
    return Ia3Config(module_names(config.get("target_modules"), "target_modules"), names)
