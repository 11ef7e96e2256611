"""Rotary position embedding (arXiv 2104.09864, equation 34) of queries and keys, as one node.

``x·cos + rotate_half(x)·sin``. The model's module keeps its ``apply_rotary_pos_emb`` under a
wrapper, which takes this way inside a packed pass if both gave the same when it was installed.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from worker.training.packed import layout, pool

_FUNCTION = "apply_rotary_pos_emb"
_Pair = tuple[torch.Tensor, torch.Tensor]


def install(model: nn.Module) -> bool:
    """Wrap the rotary function of the module that defines `model`; return whether it is wrapped."""
    module = sys.modules[type(model).__module__]
    own = getattr(module, _FUNCTION, None)
    if own is None:
        return False
    if not isinstance(own, _Wrapper):
        if not _gives_the_same(own):
            return False
        setattr(module, _FUNCTION, _Wrapper(own))
    return True


class _Wrapper:
    def __init__(self, own: Callable[..., _Pair]) -> None:
        self._own = own

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> _Pair:
        if args or kwargs or not layout.is_active() or cos.shape[-1] != q.shape[-1]:
            return self._own(q, k, cos, sin, *args, **kwargs)
        pair: _Pair = _Rotation.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
        return pair


def _gives_the_same(own: Callable[..., _Pair]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2))
    half = torch.randn(1, 5, 4, generator=generator)
    angles = torch.cat([half, half], -1)
    cos, sin = angles.cos(), angles.sin()
    try:
        expected = own(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return False  # another signature
    found = _Rotation.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
    return len(expected) == 2 and all(
        torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, found, strict=True)
    )


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> _Pair:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, to_q: torch.Tensor, to_k: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotate(to_q, cos, -sin), _rotate(to_k, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    rotated = torch.mul(x, cos, out=pool.empty(x, *x.shape))
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated
