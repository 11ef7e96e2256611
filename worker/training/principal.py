"""Starts of LoRA at the base weights' own main directions, as plain LoRA beside an untouched base.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) subtract ``scale · B₀ A₀`` from the base and
train A and B from A₀ and B₀. A base that many adapters share cannot be changed, so the negative
goes into the adapter instead: with A = [A₀; A₀] and B = [B₀, −B₀] of rank 2r,
``W x + scale · B A x`` is ``W x`` at the start, and only the first r rows of A and columns of B
learn. Weight decay, where asked for, shrinks both halves and so draws the *change* towards 0.
"""

from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from models.errors import InvalidRequestError

ITERATIONS = 16
"""Of the randomised SVD, as PiSSA's authors use it; the start is exact however good the SVD is."""
_OVERSAMPLING = 8

Start = Literal["pissa", "olora"]


def start_principal(model: PeftModel, start: Start, adapter: str = "default") -> None:
    """Set the matrices of every LoRA layer, whose ranks are 2r, and let half of each learn.

    Uses torch's global random numbers.

    Raises:
        InvalidRequestError: r is larger than a side of a targeted weight (``peft.r``).
    """
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        rank = module.r[adapter] // 2
        weight = frozen_weight(module.get_base_layer())
        if rank > min(weight.shape):
            raise InvalidRequestError(
                f"peft.r: {rank} is more than the rank of {path} (shape {list(weight.shape)}), so "
                f"init {start!r} has no start for it. Lower r, or leave init out.",
                param="peft.r",
            )
        a, b = factors(weight, rank, module.scaling[adapter], start)
        first, second = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        assert isinstance(first, nn.Parameter)
        assert isinstance(second, nn.Parameter)
        first.data = torch.cat([a, a]).to(first)
        second.data = torch.cat([b, -b], dim=1).to(second)
        _let_learn(first, slice(None, rank), dim=0)
        _let_learn(second, slice(None, rank), dim=1)


def frozen_weight(layer: nn.Module) -> torch.Tensor:
    """Return a frozen layer's weight as float32 [out, in], dequantised where it is 4-bit."""
    weight: torch.Tensor = dequantize_module_weight(layer).detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight


def factors(
    weight: torch.Tensor, rank: int, scale: float, start: Start
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A₀ [rank, in] and B₀ [out, rank].

    PiSSA: ``scale · B₀ A₀`` is the best approximation of `weight` of that rank, as far as a
    randomised SVD finds it, with its singular values shared equally. OLoRA: B₀ A₀ is the leading
    part of ``weight = Q R``.
    """
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    width = min(rank + _OVERSAMPLING, *weight.shape)
    u, values, v = torch.svd_lowrank(weight, q=width, niter=ITERATIONS)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


def _let_learn(parameter: torch.Tensor, part: slice, *, dim: int) -> None:
    """Zero the gradient of all but `part` of a parameter along `dim`, whatever computes it."""
    mask = torch.zeros(parameter.shape[dim], device=parameter.device)
    mask[part] = 1
    shaped = mask[:, None] if dim == 0 else mask
    parameter.register_hook(lambda gradient: gradient * shaped.to(gradient))
