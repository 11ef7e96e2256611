"""Linear layers of a CPU without products in bfloat16: weights in float16, sums in float32.

Decoding reads all weights for every token, so half the bytes is up to half the time. The products
are PyTorch's own (FBGEMM); they are as fast as those of float32 for long prompts too.
"""

import math

import torch
from torch import nn

LARGEST = 2.0**15
"""A power of two within float16 (65,504)."""
MOST_SHIFT = 24
"""Bits by which weights are moved at most, so that what `x` loses by it is below float32's own."""


class HalfLinear(nn.Linear):
    """``y = x Wᵀ + b`` in float32; W [out, in] is held in float16, moved by a power of two.

    Moved, the largest weight is just within float16. Weights that were bfloat16 then stay exactly
    what they were, but for those below 2^-31 of the largest; others are rounded to 11 bits, where
    bfloat16 would leave 8.

    Args:
        linear: The layer in float32, on the CPU; it is not changed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # without the weights that nn.Linear would make
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        shift = math.floor(math.log2(LARGEST / largest)) if largest else 0
        self._factor = 2.0 ** -max(-MOST_SHIFT, min(MOST_SHIFT, shift))
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight / self._factor, bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weights as they are multiplied, float32 [out, in]: unpacked at each call."""
        packed, _ = torch.ops.quantized.linear_unpack_fp16(self._packed)
        return packed.float() * self._factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` float32 [..., in] to float32 [..., out]."""
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x * self._factor, self._packed)
        return y


def hold_in_half_(model: nn.Module) -> int:
    """Replace every ``nn.Linear`` of `model` in place; return how many there are.

    Their own weights are given up; a head that shares them with the embedding has its own then.
    """
    layers = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    for path in layers:
        model.set_submodule(path, HalfLinear(model.get_submodule(path)))  # type: ignore[arg-type]
    return len(layers)
