"""What stands between the products of a layer, as operators: by the device of the tensors.

Loops on a CPU (`worker.kernels`), kernels on a GPU (`worker.gpu`); where there are neither, the
modules here do with PyTorch's own operations, which go through memory several times more.
"""

from functools import lru_cache
from typing import Protocol

import structlog
import torch

from worker.kernels import operators, training

log = structlog.get_logger(__name__)

_Pair = tuple[torch.Tensor, torch.Tensor]
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Operators(Protocol):
    """As `worker.kernels.operators` and `worker.kernels.training` explain them."""

    def rescale(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        /,
        *,
        out: torch.Tensor,
        factors: torch.Tensor,
    ) -> torch.Tensor: ...

    def add_and_rescale(
        self,
        x: torch.Tensor,
        z: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        /,
        *,
        out: _Pair,
        factors: torch.Tensor,
    ) -> _Pair: ...

    def rescale_back(  # noqa: PLR0913 - what `rescale` was given and made
        self,
        gradient: torch.Tensor,
        y: torch.Tensor,
        weight: torch.Tensor,
        factors: torch.Tensor,
        other: torch.Tensor | None,
        /,
        *,
        out: torch.Tensor,
        is_bare: bool = False,
    ) -> torch.Tensor: ...

    def gated(
        self, gate: torch.Tensor, value: torch.Tensor, /, *, out: torch.Tensor
    ) -> torch.Tensor: ...

    def gated_back(self, gradient: torch.Tensor, both: torch.Tensor, /, *, out: _Pair) -> None: ...

    def cross_entropy_(
        self, logits: torch.Tensor, labels: torch.Tensor, /, *, wants_gradient: bool
    ) -> _Pair: ...


class LoopOperators:
    """Those of `worker.kernels`."""

    rescale = staticmethod(operators.rescale)
    add_and_rescale = staticmethod(operators.add_and_rescale)
    rescale_back = staticmethod(training.rescale_back)
    gated = staticmethod(operators.gated)
    gated_back = staticmethod(training.gated_back)
    cross_entropy_ = staticmethod(training.cross_entropy_)


_LOOPS = LoopOperators()


def operators_of(like: torch.Tensor) -> Operators | None:
    """Return the operators for such tensors, or None where there are only PyTorch's own."""
    match like.device.type:
        case "cpu" if operators.is_supported(like.dtype):
            return _LOOPS
        case "cuda" if like.dtype in GPU_DTYPES:
            return _gpu_operators()
    return None


@lru_cache(maxsize=1)
def _gpu_operators() -> Operators | None:
    """Return the kernels of a GPU if they can be compiled here; log why they cannot."""
    try:
        from worker.gpu import operators as on_gpu

        on_gpu.try_out("cuda")
    except Exception as error:  # noqa: BLE001 - Triton, a C compiler or its headers are missing
        log.warning("no_gpu_kernels", reason=f"{type(error).__name__}: {error}"[:500])
        return None
    return on_gpu
