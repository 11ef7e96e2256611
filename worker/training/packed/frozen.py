"""The frozen weight of one linear layer, ready for a product whatever it is held in."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from worker.int8 import Int8Linear


class FrozenWeight:
    """Weight [outputs, inputs] and bias [outputs] or None of a layer.

    Weights in 4 or 8 bits stay packed and are dequantised at each use, or once for all if `cache`
    is set (16 instead of 4.1 or 8 bits a parameter).

    Args:
        layer: ``nn.Linear``, bitsandbytes' ``Linear4bit`` or `Int8Linear`.
        cache: Keep such a weight dequantised.
    """

    def __init__(self, layer: nn.Linear, *, cache: bool) -> None:
        self.outputs, self.inputs = layer.out_features, layer.in_features
        self.bias = None if layer.bias is None else layer.bias.data
        self._int8 = layer if isinstance(layer, Int8Linear) else None
        self._packed: Any = None
        self._weight: torch.Tensor | None = None
        if self._int8 is None and hasattr(layer.weight, "quant_state"):
            self._packed = layer.weight
        elif self._int8 is None:
            self._weight = layer.weight.data
        if cache:
            self._weight = self.get()

    def get(self) -> torch.Tensor:
        """Return the weight in the dtype of the product."""
        if self._weight is not None:
            return self._weight
        if self._int8 is not None:
            return self._int8.weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self._packed.data, self._packed.quant_state)


def columns_of(weights: Sequence[FrozenWeight]) -> list[tuple[FrozenWeight, slice]]:
    """Return each weight with the columns that are its own where all outputs are side by side."""
    ends = accumulate((weight.outputs for weight in weights), initial=0)
    return [(weight, slice(*span)) for weight, span in zip(weights, pairwise(ends), strict=True)]
