"""Norms and Transformer layers of the base model, wrapped once; linear layers: `engine.lora`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from worker.inference.engine.bottlenecks import beside
from worker.inference.engine.slots import LayerBuffers, Slots
from worker.kernels.operators import is_supported, rescale
from worker.transformer_blocks import (
    Call,
    attention_block,
    attention_projection,
    feed_forward_block,
    feed_forward_of,
    is_bert_like,
)

Fused = Callable[
    [torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor | None, Any], torch.Tensor
]


class Adapted(nn.Module):
    """A module of the base, whose attributes it shows, and what the slots make of it.

    It has no ``weight``: a model that multiplies by a module's weight itself, and so would lose
    the adapter without a word, fails with an ``AttributeError`` instead.
    """

    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self._slots: Slots | None = None
        self._mine: LayerBuffers | None = None
        self.path = ""

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for facts, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "weight", "bias"):
                raise
            return getattr(super().__getattr__("base"), name)

    def attach(self, slots: Slots, path: str) -> None:
        """Let `slots` decide what is changed; before that the module is the base's own."""
        self._slots, self._mine, self.path = slots, slots.layers[path], path

    def _users(self, name: str) -> bool:
        """Whether a row of this pass has a vector of this name here."""
        slots, mine = self._slots, self._mine
        return (
            slots is not None and mine is not None and not mine.users[name].isdisjoint(slots.active)
        )


class AdaptedNorm(Adapted):
    """A norm with the weight and bias of each row's adapter, or the base's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.epsilon: float | None = None
        """That of the base's norm, where `rescale` is what it computes."""

    def attach(self, slots: Slots, path: str) -> None:
        super().attach(slots, path)
        self.epsilon = rms_epsilon(self.base) if slots.compiled is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [rows, …, d] to the same shape; without adapters, the base's own tensor."""
        own = {name: self._own(name, x.dim()) for name in ("weight", "bias") if self._users(name)}
        base: Any = self.base
        if not own:
            if self.epsilon is not None and x.dtype == base.weight.dtype:
                return rescale(x, base.weight, self.epsilon)
            return base(x)
        weight: torch.Tensor = own.get("weight", base.weight)
        bias: torch.Tensor | None = own.get("bias", getattr(base, "bias", None))
        if isinstance(base, nn.LayerNorm):  # its kernel takes one weight for all rows
            y = functional.layer_norm(x, base.normalized_shape, None, None, base.eps) * weight
            return y if bias is None else y + bias
        return functional_call(base, own, (x,))

    def _own(self, name: str, n_dims: int) -> torch.Tensor:
        slots, mine = self._slots, self._mine
        assert slots is not None
        assert mine is not None
        base = self.base.get_parameter(name)
        users = mine.users[name]
        vectors = mine.vectors[name].to(base.dtype)
        if len(set(slots.rows)) == 1:
            return vectors[slots.rows[0]]
        has_own = torch.tensor([row in users for row in slots.rows], device=base.device)
        rows = torch.where(has_own[:, None], vectors[slots.index], base)
        return beside(rows, n_dims)


class AdaptedLayer(Adapted):
    """A Transformer layer in which rows may run in two streams (`StreamRows`)."""

    def __init__(self, base: nn.Module, *, is_first: bool) -> None:
        super().__init__(base)
        self._is_first = is_first
        self.fused: Fused | None = None
        """Computes the same, for passes whose adapters only add products of low rank."""
        self._returns_tuple = False
        self._attends_only = False
        base.register_forward_hook(self._note_form)
        feed_forward = feed_forward_of(base)
        if is_bert_like(base):
            feed_forward.register_forward_pre_hook(self._into_residual)
        else:
            feed_forward.register_forward_hook(self._beside_feed_forward)
        attention_projection(base).register_forward_hook(self._after_attention)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slots = self._slots
        streams = slots.streams if slots is not None else None
        if streams is None:
            turns = kwargs.get("position_embeddings")
            is_plain = slots is not None and slots.adds_only and len(args) == 1
            if self.fused is None or not is_plain or turns is None:
                return self.base(*args, **kwargs)
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            return self.fused(args[0], turns, kwargs.get("attention_mask"), cache)
        hidden, *others = args if args else [kwargs.pop("hidden_states")]
        call = Call(tuple(others), kwargs)
        hidden = streams.enter(hidden, self._couple, is_first=self._is_first)
        if not streams.splits:
            output = self.base(hidden, *call.args, **call.kwargs)
            hidden = output[0] if self._returns_tuple else output
        else:
            self._attends_only = True
            try:
                hidden = attention_block(self.base, call, hidden)
            finally:
                self._attends_only = False
            hidden = feed_forward_block(self.base, call, streams.between(hidden))
            output = (hidden,)
        hidden = streams.leave(hidden, self._couple)
        return (hidden, *output[1:]) if self._returns_tuple else hidden

    def _couple(self, x: torch.Tensor) -> torch.Tensor:
        added = self._added("coupling", x)
        return torch.zeros_like(x) if added is None else added

    def _added(self, place: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return what the rows' bottlenecks at `place` make of `x`; None where there are none."""
        slots, mine = self._slots, self._mine
        if slots is None or mine is None or place not in mine.bottlenecks:
            return None
        bottlenecks = mine.bottlenecks[place]
        if not bottlenecks.is_used_by(slots.active):
            return None
        return bottlenecks.added(x, slots.index, slots.active).to(x.dtype)

    def _beside_feed_forward(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        added = None if self._attends_only else self._added("feed_forward", args[0])
        return output if added is None else output + added

    def _into_residual(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        added = None if self._attends_only else self._added("feed_forward", args[1])
        return None if added is None else (args[0], args[1] + added)

    def _after_attention(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        added = self._added("attention", output)
        return output if added is None else output + added

    def _note_form(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._returns_tuple = isinstance(output, tuple)


def is_norm(module: nn.Module) -> bool:
    """Whether a module rescales by one vector, so that each row may have its own."""
    weight = getattr(module, "weight", None)
    return (
        "Norm" in type(module).__name__
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 1
        and not list(module.children())
    )


def rms_epsilon(norm: nn.Module) -> float | None:
    """Return ε where `norm` is what `rescale` computes, which is tried; None where it is not."""
    weight = norm.get_parameter("weight")
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(epsilon, float) or not is_supported(weight.dtype):
        return None
    x = torch.linspace(-1, 3, 2 * len(weight)).view(2, -1).to(weight.dtype)
    with torch.inference_mode():
        expected, found = norm(x), rescale(x, weight, epsilon)
    nearly = 4 * torch.finfo(weight.dtype).eps
    is_same = found.dtype == expected.dtype and torch.allclose(found, expected, nearly, nearly)
    return epsilon if is_same else None
