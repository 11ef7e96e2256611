"""A strict reader of ``adapter_config.json``: what it does not understand, it refuses.

Other servers drop what they do not know, and answer with a model that nobody trained. So every
key must be one that is served, one that cannot change a forward pass, or switched off.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.params import LinearShape

MAX_CONFIG_BYTES = 1024**2
ALL_LINEAR = "all-linear"

_SERVED = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "bias",
    "init_lora_weights",
}
_WITHOUT_EFFECT = {
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
"""Keys that say nothing about the forward pass of a frozen adapter, or only beside another key."""

_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Those that leave the base weights alone; ``pissa``, ``olora`` and others change them."""

_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_.]+")
"""PEFT takes these keys as regular expressions; only plain paths are safe to match."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of PEFT's ``LoraConfig`` that decides the forward pass."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | None
    """None stands for ``all-linear``."""

    def targets(self, path: str, shape: LinearShape) -> bool:
        """Tell whether PEFT would have put an adapter on this linear layer."""
        if self.target_modules is None:
            return not shape.is_output
        return any(path == name or path.endswith(f".{name}") for name in self.target_modules)

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


def read_config(path: Path) -> LoraConfig:
    """Read and check an ``adapter_config.json``; raises `AdapterFormatError`."""
    config = _parse(path)
    for key, value in config.items():
        if key not in _SERVED | _WITHOUT_EFFECT and value not in (None, False, {}, []):
            raise AdapterFormatError(
                "unsupported_feature", f"adapter_config.json sets {key!r}, which is not served"
            )
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterFormatError("unsupported_method", f"peft_type is {kind!r}, not 'LORA'")
    if (bias := config.get("bias", "none")) != "none":
        raise AdapterFormatError("unsupported_feature", f"bias is {bias!r}, not 'none'")
    start = config.get("init_lora_weights", True)
    if not any(start is known or start == known for known in _INITIALISATIONS):
        raise AdapterFormatError(
            "unsupported_feature",
            f"init_lora_weights is {start!r}, which trains against changed base weights",
        )
    return LoraConfig(
        r=_rank(config.get("r"), "r"),
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(config.get("use_rslora", False), "use_rslora"),
        rank_pattern={
            key: _rank(value, f"rank_pattern[{key!r}]")
            for key, value in _pattern(config, "rank_pattern").items()
        },
        alpha_pattern={
            key: _alpha(value, f"alpha_pattern[{key!r}]")
            for key, value in _pattern(config, "alpha_pattern").items()
        },
        target_modules=_target_modules(config.get("target_modules")),
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterFormatError("bad_config", "adapter_config.json is larger than 1 MiB")
        config = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise AdapterFormatError("missing_file", "there is no adapter_config.json") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError("bad_config", f"adapter_config.json: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFormatError("bad_config", "adapter_config.json is not an object")
    return config


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise AdapterFormatError("bad_config", f"{name} is {value!r}, not a positive integer")
    return value


def _alpha(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise AdapterFormatError("bad_config", f"{name} is {value!r}, not a positive number")
    return float(value)


def _flag(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise AdapterFormatError("bad_config", f"{name} is {value!r}, not true or false")
    return value


def _pattern(config: dict[str, Any], name: str) -> dict[str, Any]:
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise AdapterFormatError("bad_config", f"{name} is not an object")
    for key in pattern:
        if not _PATTERN_KEY.fullmatch(key):
            raise AdapterFormatError(
                "unsupported_feature", f"{name} has the key {key!r}, which is no plain module path"
            )
    return pattern


def _target_modules(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return None
        raise AdapterFormatError(
            "unsupported_feature", f"target_modules is the pattern {value!r}, not a list of names"
        )
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise AdapterFormatError("bad_config", "target_modules is not a list of module names")
    return tuple(value)
