"""Which way the products and the attention of a pass go."""

import torch

from worker.kernels.products import is_supported
from worker.training.packed.attend import Attention, LoopAttention, ProductAttention
from worker.training.packed.flash import FlashAttention
from worker.training.packed.loop_products import LoopProducts
from worker.training.packed.products import Products
from worker.training.packed.torch_products import TorchProducts


def products_of(like: torch.Tensor) -> type[Products]:
    """Return the way for products of such tensors."""
    return LoopProducts if is_supported(like) else TorchProducts


def attention_of(like: torch.Tensor) -> type[Attention]:
    """Return the way for attention of such tensors."""
    if like.device.type == "cuda":
        return FlashAttention
    return LoopAttention if is_supported(like) else ProductAttention
