"""Frozen linear layers with weights in 8 bits: half of bfloat16's memory, twice NF4's.

A row of the weight has one scale, its largest magnitude over 127, as in LLM.int8() (Dettmers et
al., 2022, arXiv 2208.07339, section 3.1, row-wise). Activations stay what they are: weights are
dequantised for each product, so nothing of an input is rounded.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LARGEST = 127


class Int8Linear(nn.Linear):
    """``y = x Wᵀ + b`` with W [out, in] as ``codes`` int8 [out, in] and ``scale`` float32 [out].

    Args:
        weight: What is quantised, [out, in].
        bias: [out] or None.
        dtype: That of the product.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # without the weight that nn.Linear would make
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        scale = weight.detach().float().abs().amax(1) / LARGEST
        codes = weight.detach().float() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        self.register_buffer("codes", codes.round().to(torch.int8))
        self.register_buffer("scale", scale)
        kept = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self.register_parameter("bias", kept)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight as it is multiplied, [out, in] in `dtype`: dequantised at each call."""
        codes, scale = self.get_buffer("codes"), self.get_buffer("scale")
        return (codes.float() * scale[:, None]).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [..., in] to [..., out]."""
        y: torch.Tensor = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """``x Wᵀ``, which keeps no dequantised weight for the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.weight, None


def quantise_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the linear layers of a model in 8 bits, in place; not its output, nor a new head.

    Args:
        model: Its parameters that want gradients are those of a new head.
        dtype: That of the products.
    """
    output = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if module is output or not isinstance(module, nn.Linear | Conv1D):
            continue
        if module.weight.requires_grad:
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        quantised = Int8Linear(weight, module.bias, dtype).train(module.training)
        model.set_submodule(path, quantised)


def dequantise_int8_(model: nn.Module) -> None:
    """Replace every `Int8Linear` of `model` by an ``nn.Linear`` with the same values, in place."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, Int8Linear):
            continue
        plain = nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta"
        )
        plain.weight = nn.Parameter(module.weight, requires_grad=False)
        if module.bias is not None:
            plain.bias = module.bias
        model.set_submodule(path, plain.train(module.training))


def int8_bytes(model: nn.Module) -> int:
    """Return what the weights of all `Int8Linear` would take in the dtype of their products."""
    layers = (each for each in model.modules() if isinstance(each, Int8Linear))
    return sum(each.in_features * each.out_features * each.dtype.itemsize for each in layers)
