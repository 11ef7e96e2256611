"""MEFT (arXiv 2306.00477): all layers in two streams, with bottlenecks in both couplings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.activations import ACT2FN

from worker.fixed_point import MAX_BITS
from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.base import (
    ReadBase,
    integer,
    module_names,
    one_of,
    refuse_unknown,
)
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import Bottleneck, ModuleChange, TwoStreams, Variant

_KNOWN = frozenset(
    {
        "peft_type",
        "variant",
        "lambda_bits",
        "r",
        "activation",
        "target_modules",
        # What follows says nothing about the forward pass of a frozen adapter.
        "dropout",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "auto_mapping",
        "inference_mode",
    }
)
_PLACES: Mapping[Variant, tuple[str, ...]] = {
    "meft1": ("feed_forward", "coupling"),
    "meft2": ("feed_forward", "coupling"),
    "meft3": ("attention", "feed_forward"),
}
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


@dataclass(frozen=True, slots=True)
class MeftConfig:
    """The part of the training tuner's ``MeftConfig`` that decides the forward pass."""

    variant: Variant
    bits: int
    r: int
    activation: str
    target_modules: tuple[str, ...]
    """The layers' paths from the bottom."""

    @property
    def names(self) -> frozenset[str]:
        places = _PLACES[self.variant]
        return frozenset(f"meft_{place}.{part}" for place in places for part in _PARTS)

    def targets(self, path: str, shape: ModuleShape) -> bool:
        """All layers of the model, for no layer can stay in one stream between others in two."""
        return shape.kind == "layer"

    def shapes(self, path: str, shape: ModuleShape) -> dict[str, list[int]]:
        r, width = self.r, shape.out_features
        sizes = ([r, width], [r], [width, r], [width])
        return {
            f"meft_{place}.{part}": size
            for place in self._places(path)
            for part, size in zip(_PARTS, sizes, strict=True)
        }

    def change(
        self, path: str, tensors: Mapping[str, torch.Tensor], base: ReadBase
    ) -> ModuleChange:
        """Return that the layer runs in two streams, and its bottlenecks."""
        bottlenecks = {}
        for place in self._places(path):
            down, down_bias, up, up_bias = (tensors[f"meft_{place}.{part}"] for part in _PARTS)
            bottlenecks[place] = Bottleneck(down, down_bias, up, up_bias, self.activation)
        return ModuleChange(bottlenecks=bottlenecks, streams=TwoStreams(self.variant, self.bits))

    def _places(self, path: str) -> list[str]:
        # In meft1 the G of the last layer would add to the stream that nothing reads any more.
        is_last = path == self.target_modules[-1]
        spared = {"coupling"} if self.variant == "meft1" and is_last else set()
        return [place for place in _PLACES[self.variant] if place not in spared]


def read(config: Mapping[str, Any]) -> MeftConfig:
    """Check the configuration of a MEFT adapter; raises `AdapterFormatError`."""
    refuse_unknown(config, _KNOWN)
    bits = integer(config.get("lambda_bits"), "lambda_bits")
    if bits > MAX_BITS:
        raise AdapterFormatError("bad_config", f"lambda_bits is {bits}, more than {MAX_BITS}")
    names = module_names(config.get("target_modules"), "target_modules")
    if names is None:
        raise AdapterFormatError("bad_config", "target_modules is not a list of the layers' paths")
    variant = config.get("variant")
    for known in _PLACES:
        if variant == known:
            return MeftConfig(
                variant=known,
                bits=bits,
                r=integer(config.get("r"), "r"),
                activation=one_of(config.get("activation"), "activation", ACT2FN),
                target_modules=names,
            )
    raise AdapterFormatError("unsupported_feature", f"variant is {variant!r}, which is not served")
