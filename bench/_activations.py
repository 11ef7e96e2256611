"""What a forward pass keeps for its backward pass."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that the graph of `forward` keeps, those of parameters left out.

    What is kept for a moment only, inside of the pass, does not count.
    """
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            # Detached, since an output of a node that the node itself holds would never be freed.
            self.tensor = tensor.detach()
            weight = tensor if tensor._base is None else tensor._base
            if not isinstance(weight, torch.nn.Parameter):
                alive.add(self)

    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        output = forward()
    storages = {each.tensor.untyped_storage().data_ptr(): each.tensor for each in alive}
    n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del output
    return n_bytes
