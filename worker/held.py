"""How weights are held that were just loaded: in which dtype, in whose memory."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn


def compute_in_float32_(model: nn.Module) -> None:
    """Hold what is in bfloat16 in float32, and have NF4 weights dequantised to it, in place."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed: Any = module.weight
            module.compute_dtype = packed.quant_state.dtype = torch.float32
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.float()


def leave_files_(model: nn.Module) -> int:
    """Give what a model on a CPU computes with as it was read memory of its own, in place.

    Weights lie in the pages of their file, and one that is left there, such as the embedding of a
    base whose layers were quantised, keeps the whole file in memory.

    Returns:
        Bytes that were copied.
    """
    n_bytes = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point():
            tensor.data = tensor.data.clone()
            n_bytes += tensor.nbytes
    return n_bytes
