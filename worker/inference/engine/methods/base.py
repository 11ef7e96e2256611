"""What the engine asks of a method: which tensors an adapter has, and what they do to a layer."""

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, Protocol

import torch

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import BaseLinear, ModuleChange

ALL_LINEAR = "all-linear"
ReadBase = Callable[[str], BaseLinear]


class Method(Protocol):
    """The checked configuration of one adapter."""

    @property
    def names(self) -> frozenset[str]:
        """The tensors of a module, by what follows its path in the file."""

    def targets(self, path: str, shape: ModuleShape) -> bool:
        """Tell whether PEFT would have put this adapter on this module."""

    def shapes(self, path: str, shape: ModuleShape) -> dict[str, list[int]]:
        """Return the shape of every tensor that a module of this path and size must have."""

    def change(
        self, path: str, tensors: Mapping[str, torch.Tensor], base: ReadBase
    ) -> ModuleChange:
        """Return what the float32 `tensors` of one module do to it.

        Args:
            path: Of the module.
            tensors: By `names`.
            base: Gives the base's own linear layer of a path.
        """


def integer(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise AdapterFormatError("bad_config", f"{name} is {value!r}, not a positive integer")
    return value


def number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise AdapterFormatError("bad_config", f"{name} is {value!r}, not a positive number")
    return float(value)


def one_of(value: Any, name: str, known: Container[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise AdapterFormatError("unsupported_feature", f"{name} is {value!r}, which is not served")
    return value


def flag(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise AdapterFormatError("bad_config", f"{name} is {value!r}, not true or false")
    return value


def module_names(value: Any, name: str) -> tuple[str, ...] | None:
    """Return a list of module names, or None for ``all-linear``."""
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return None
        raise AdapterFormatError(
            "unsupported_feature", f"{name} is the pattern {value!r}, not a list of names"
        )
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise AdapterFormatError("bad_config", f"{name} is not a list of module names")
    return tuple(value)


def is_named(path: str, names: tuple[str, ...] | None, shape: ModuleShape) -> bool:
    """PEFT's own rule: whole components at the end of the path; all but the head for None.

    Of linear layers only: nothing else takes what these methods add.
    """
    if shape.kind != "linear":
        return False
    if names is None:
        return not shape.is_output
    return any(path == name or path.endswith(f".{name}") for name in names)


def refuse_unknown(config: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse every key that is neither `known` nor switched off."""
    for key, value in config.items():
        if key not in known and value not in (None, False, {}, []):
            raise AdapterFormatError(
                "unsupported_feature", f"adapter_config.json sets {key!r}, which is not served"
            )
