"""The frozen weight of one linear layer, ready for a product whatever it is held in."""

from typing import Any

import torch
from torch import nn


class FrozenWeight:
    """Weight [outputs, inputs] and bias [outputs] or None of a layer.

    NF4 weights stay packed and are dequantised at each use, or once for all if `cache` is set (16
    instead of 4.1 bits a parameter).

    Args:
        layer: ``nn.Linear`` or bitsandbytes' ``Linear4bit``.
        cache: Keep an NF4 weight dequantised.
    """

    def __init__(self, layer: nn.Linear, *, cache: bool) -> None:
        self.outputs, self.inputs = layer.out_features, layer.in_features
        self.bias = None if layer.bias is None else layer.bias.data
        self._packed: Any = layer.weight if hasattr(layer.weight, "quant_state") else None
        self._weight: torch.Tensor | None = None if self._packed is not None else layer.weight.data
        if cache and self._packed is not None:
            self._weight = self.get()

    def get(self) -> torch.Tensor:
        """Return the weight in the dtype of the product."""
        if self._weight is not None:
            return self._weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self._packed.data, self._packed.quant_state)
