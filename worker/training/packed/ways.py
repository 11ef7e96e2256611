"""Which way the products of a pass go."""

import torch

from worker.kernels.products import is_supported
from worker.training.packed.loop_products import LoopProducts
from worker.training.packed.products import Products
from worker.training.packed.torch_products import TorchProducts


def products_of(like: torch.Tensor) -> type[Products]:
    """Return the way for products of such tensors."""
    return LoopProducts if is_supported(like) else TorchProducts
