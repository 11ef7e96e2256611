"""LoRA (arXiv 2106.09685), rank-stabilised LoRA (2312.03732) and DoRA (2402.09353)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.base import (
    ReadBase,
    flag,
    integer,
    is_named,
    module_names,
    number,
    refuse_unknown,
)
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import ModuleChange

_KNOWN = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "bias",
        "init_lora_weights",
        # What follows says nothing about the forward pass of a frozen adapter, or only beside
        # another key.
        "task_type",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "auto_mapping",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",  # the layout of the base weight, which matters to merging only
        "megatron_core",
        "qalora_group_size",
    }
)

_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Those that leave the base weights alone; ``pissa``, ``olora`` and others change them."""

_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_.]+")
"""PEFT takes these keys as regular expressions; only plain paths are safe to match."""

_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of PEFT's ``LoraConfig`` that decides the forward pass."""

    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | None
    """None stands for ``all-linear``."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset({_A, _B, _MAGNITUDE} if self.use_dora else {_A, _B})

    def targets(self, path: str, shape: ModuleShape) -> bool:
        return is_named(path, self.target_modules, shape)

    def shapes(self, path: str, shape: ModuleShape) -> dict[str, list[int]]:
        rank = self.rank(path)
        found = {_A: [rank, shape.in_features], _B: [shape.out_features, rank]}
        return found | ({_MAGNITUDE: [shape.out_features]} if self.use_dora else {})

    def change(
        self, path: str, tensors: Mapping[str, torch.Tensor], base: ReadBase
    ) -> ModuleChange:
        """Return A, B and their scale; for DoRA, its gain g = m / ‖W + s·B·A‖ as well.

        DoRA's layer is ``g (W x + s B A x) + b`` (section 4.3: the norm is a constant), so that g
        and s go into B, and the bias, which g spares, comes back as a shift.
        """
        a, b, scale = tensors[_A], tensors[_B], self.scale(path)
        if not self.use_dora:
            return ModuleChange(a, b, scale)
        own, b = base(path), b * scale
        norm = torch.linalg.norm(own.weight + b @ a, dim=1)
        gain = tensors[_MAGNITUDE] / norm
        shift = None if own.bias is None else (1 - gain) * own.bias
        return ModuleChange(a, gain[:, None] * b, gain=gain, shift=shift)

    def rank(self, path: str) -> int:
        return self.rank_pattern.get(_matching_key(self.rank_pattern, path), self.r)

    def scale(self, path: str) -> float:
        """Return alpha / r, or alpha / √r for rank-stabilised LoRA (arXiv 2312.03732)."""
        alpha = self.alpha_pattern.get(_matching_key(self.alpha_pattern, path), self.alpha)
        rank = self.rank(path)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _matching_key(pattern: Mapping[str, Any], path: str) -> str:
    # PEFT's own rule (peft.utils.other.get_pattern_key): the first key that matches the path's end.
    for key in pattern:
        if re.match(rf"(.*\.)?({key})$", path):
            return key
    return path


def read(config: Mapping[str, Any]) -> LoraConfig:
    """Check the configuration of a LoRA adapter; raises `AdapterFormatError`."""
    refuse_unknown(config, _KNOWN)
    if (bias := config.get("bias", "none")) != "none":
        raise AdapterFormatError("unsupported_feature", f"bias is {bias!r}, not 'none'")
    start = config.get("init_lora_weights", True)
    if not any(start is known or start == known for known in _INITIALISATIONS):
        raise AdapterFormatError(
            "unsupported_feature",
            f"init_lora_weights is {start!r}, which trains against changed base weights",
        )
    return LoraConfig(
        r=integer(config.get("r"), "r"),
        alpha=number(config.get("lora_alpha"), "lora_alpha"),
        use_rslora=flag(config.get("use_rslora", False), "use_rslora"),
        use_dora=flag(config.get("use_dora", False), "use_dora"),
        rank_pattern={
            key: integer(value, f"rank_pattern[{key!r}]")
            for key, value in _pattern(config, "rank_pattern").items()
        },
        alpha_pattern={
            key: number(value, f"alpha_pattern[{key!r}]")
            for key, value in _pattern(config, "alpha_pattern").items()
        },
        target_modules=module_names(config.get("target_modules"), "target_modules"),
    )


def _pattern(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise AdapterFormatError("bad_config", f"{name} is not an object")
    for key in pattern:
        if not _PATTERN_KEY.fullmatch(key):
            raise AdapterFormatError(
                "unsupported_feature", f"{name} has the key {key!r}, which is no plain module path"
            )
    return pattern
