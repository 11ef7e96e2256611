"""Frozen weights of linear layers that read the same input, stacked over their outputs."""

from typing import Any

import torch
from torch import nn


class FrozenWeight:
    """One matrix [outputs, inputs] out of the weights of several layers, and their biases.

    Full-precision weights are stacked once and the layers' own tensors become views of the stack,
    so nothing is held twice. NF4 weights stay packed and are dequantised at each use into
    `scratch`, or once for all if `cache` is set (16 instead of 4.1 bits a parameter).

    Args:
        layers: ``nn.Linear`` or bitsandbytes' ``Linear4bit``, of one kind, with equal inputs.
        scratch: Buffers by shape, shared between all groups of a model. What `get` returns from
            there holds until the next `get`.
        cache: Keep NF4 weights dequantised.
    """

    def __init__(
        self, layers: list[nn.Linear], scratch: dict[torch.Size, torch.Tensor], *, cache: bool
    ) -> None:
        self.outputs = [layer.out_features for layer in layers]
        self.inputs = layers[0].in_features
        self.bias = _stacked_bias(layers)
        self._scratch = scratch
        self._packed: list[Any] = []
        self._weight: torch.Tensor | None = None
        if hasattr(layers[0].weight, "quant_state"):
            self._packed = [layer.weight for layer in layers]
            if cache:
                self._weight = self._dequantised(self._empty())
        elif len(layers) == 1:
            self._weight = layers[0].weight.data
        else:
            self._weight = torch.cat([layer.weight.data for layer in layers])
            for layer, part in zip(layers, self._weight.split(self.outputs), strict=True):
                layer.weight.data = part

    def get(self) -> torch.Tensor:
        """Return [outputs, inputs] in the dtype of the product."""
        if self._weight is not None:
            return self._weight
        if len(self._packed) == 1:
            return _dequantise(self._packed[0])
        shape = torch.Size((sum(self.outputs), self.inputs))
        if shape not in self._scratch:
            self._scratch[shape] = self._empty()
        return self._dequantised(self._scratch[shape])

    def _empty(self) -> torch.Tensor:
        first = self._packed[0]
        return torch.empty(
            sum(self.outputs), self.inputs, dtype=first.quant_state.dtype, device=first.device
        )

    def _dequantised(self, out: torch.Tensor) -> torch.Tensor:
        for packed, part in zip(self._packed, out.split(self.outputs), strict=True):
            part.copy_(_dequantise(packed))
        return out


def _dequantise(packed: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, packed.quant_state)


def _stacked_bias(layers: list[nn.Linear]) -> torch.Tensor | None:
    biases = [layer.bias for layer in layers]
    known = next((bias for bias in biases if bias is not None), None)
    if known is None:
        return None
    return torch.cat(
        [
            known.new_zeros(layer.out_features) if layer.bias is None else layer.bias.data
            for layer in layers
        ]
    )
