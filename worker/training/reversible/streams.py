"""A stack of two-stream layers that keeps the last activations only (arXiv 2306.00477, section 3).

Layer n, with both streams on the grid of `fixed_point`::

    y1 = λ·x1 + F(x2)        y2 = β·x2 + G(y1)        then, if it swaps, (x1, x2) = (y2, y1)

The backward pass goes from the top: it evaluates G and F again, in the very kernels of the forward
pass, subtracts, and has the layer's inputs and the graph that it needs, one layer at a time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from models.errors import TrainingFailedError
from worker.fixed_point import LIMIT, from_grid, shift, to_grid, unshift

Pair = tuple[torch.Tensor, torch.Tensor]


class NotReversibleError(TrainingFailedError):
    """What was computed back is not what went in: a kernel gave other bits the second time."""

    def __init__(self) -> None:
        super().__init__(
            "The activations that MEFT computed back are not those of the forward pass, so its "
            "gradients would be wrong: this device does not repeat its own results. Set "
            "peft.reversible to false, which keeps the input of every layer instead.",
            param="peft.reversible",
            code="not_reversible",
        )


@dataclass(frozen=True, slots=True)
class Block:
    """F or G of a layer: a map of [B, T, D] to [B, T, D] and what is trained in it."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True, slots=True)
class Coupling:
    """One layer: λ = 2^-f_bits, β = 2^-g_bits; a block that is None adds nothing."""

    f: Block | None
    g: Block | None
    f_bits: int
    g_bits: int
    swaps: bool


@dataclass(slots=True)
class Plan:
    """One pass through a stack.

    Args:
        couplings: The layers from the bottom.
        output: Which stream the model goes on with, 0 or 1.
        keeps_inputs: Keep what F and G read instead of what a shift loses: more memory, and right
            on devices that do not repeat their results.
        around: Makes the context that blocks run in beside autocast.
        history: Given a list, takes the streams before each layer, which `n_mismatches` then counts
            the difference to: for tests.
    """

    couplings: Sequence[Coupling]
    output: int
    keeps_inputs: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    history: list[Pair] | None = None
    n_mismatches: int = 0
    _autocast: dict[str, Any] = field(default_factory=dict)

    def remember_autocast(self, kind: str) -> None:
        self._autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }

    def evaluate(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output with a graph up to `x` and the parameters.

        Always with gradients on, since kernels may differ with and without.
        """
        with torch.enable_grad(), torch.autocast(**self._autocast), self.around():
            return block.apply(x)


class _Draws:
    """States of torch's random generators, kept where a block has drawn from them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device

    def states(self) -> list[torch.Tensor]:
        cpu = torch.get_rng_state()
        return [cpu, torch.cuda.get_rng_state(self._device)] if self._on_gpu else [cpu]

    def set(self, states: Sequence[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._on_gpu:
            torch.cuda.set_rng_state(states[1], self._device)


def run(plan: Plan, hidden: torch.Tensor) -> torch.Tensor:
    """Send `hidden` [B, T, D] through the layers; float32, float16 or bfloat16 in and out.

    A number that is not finite, or beyond `LIMIT`, anywhere in the stack makes all of the output
    NaN.
    """
    plan.remember_autocast(hidden.device.type)
    if torch.is_grad_enabled():
        trained = [
            parameter
            for coupling in plan.couplings
            for block in (coupling.f, coupling.g)
            if block is not None
            for parameter in block.parameters
        ]
        if trained or hidden.requires_grad:
            output: torch.Tensor = _Reversible.apply(plan, hidden, *trained)
            return output
    streams, is_finite = _forward(plan, hidden, _Tape(plan, hidden.device, keeps=False))
    return _finish(streams[plan.output], is_finite, hidden.dtype)


def _finish(numbers: torch.Tensor, is_finite: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return from_grid(numbers, dtype).masked_fill_(~is_finite, torch.nan)


class _Tape:
    """What the forward pass leaves for the backward pass, in the order of evaluation."""

    def __init__(self, plan: Plan, device: torch.device, *, keeps: bool) -> None:
        self.plan = plan
        self.draws = _Draws(device)
        self.keeps = keeps
        self.lost: list[torch.Tensor | None] = []
        self.states: list[list[torch.Tensor] | None] = []
        self.inputs: list[torch.Tensor] = []

    def evaluate(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, without a graph."""
        if not self.keeps:
            with torch.autocast(**self.plan._autocast), self.plan.around():
                return block.apply(x)
        before = self.draws.states()
        found = self.plan.evaluate(block, x.detach().requires_grad_()).detach()
        after = self.draws.states()
        has_drawn = not all(map(torch.equal, before, after))
        self.states.append(before if has_drawn else None)
        if self.plan.keeps_inputs:
            self.inputs.append(x)
        return found

    def shift(self, numbers: torch.Tensor, bits: int) -> torch.Tensor:
        scaled, lost = shift(numbers, bits)
        if self.keeps and not self.plan.keeps_inputs:
            self.lost.append(lost)
        return scaled


def _forward(plan: Plan, hidden: torch.Tensor, tape: _Tape) -> tuple[Pair, torch.Tensor]:
    """Return both streams after the last layer, and whether all that was added is finite."""
    dtype = hidden.dtype
    start = to_grid(hidden)
    x1 = x2 = start
    is_finite = hidden.detach().abs().amax() < LIMIT

    def added(x: torch.Tensor, block: Block | None, read: torch.Tensor) -> torch.Tensor:
        nonlocal is_finite
        if block is None:
            return x
        found = tape.evaluate(block, from_grid(read, dtype))
        is_finite = is_finite & (found.abs().amax() < LIMIT)
        return x + to_grid(found)

    for coupling in plan.couplings:
        if plan.history is not None:
            plan.history.append((x1, x2))
        y1 = added(tape.shift(x1, coupling.f_bits), coupling.f, x2)
        y2 = added(tape.shift(x2, coupling.g_bits), coupling.g, y1)
        x1, x2 = (y2, y1) if coupling.swaps else (y1, y2)
    return (x1, x2), is_finite


class _Reversible(torch.autograd.Function):
    """`run` with gradients for the hidden states and all trained parameters."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, hidden: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        tape = _Tape(plan, hidden.device, keeps=True)
        streams, is_finite = _forward(plan, hidden, tape)
        output = _finish(streams[plan.output], is_finite, hidden.dtype)
        ctx.plan, ctx.dtype, ctx.n_trained = plan, hidden.dtype, len(trained)
        ctx.draws = tape.draws
        ctx.checksum = to_grid(hidden.detach()).sum()
        ctx.is_finite = is_finite
        kept: list[torch.Tensor] = [] if plan.keeps_inputs else list(streams)
        ctx.lost = _put(kept, tape.lost)
        ctx.inputs = _put(kept, tape.inputs)
        ctx.states = [None if states is None else _put(kept, states) for states in tape.states]
        ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back = _Backward(ctx)
        gradient = back.run(grad_outputs[0])
        wanted = gradient.to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return None, wanted, *reversed(back.gradients)


def _put(kept: list[torch.Tensor], tensors: Sequence[torch.Tensor | None]) -> list[int | None]:
    """Append `tensors` to `kept`; return the place of each."""
    places: list[int | None] = []
    for tensor in tensors:
        places.append(None if tensor is None else len(kept))
        if tensor is not None:
            kept.append(tensor)
    return places


class _Backward:
    """The way down: takes from its lists what the tape appended, last first."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self._plan: Plan = ctx.plan
        self._saved = ctx.saved_tensors
        self._lost, self._inputs = list(ctx.lost), list(ctx.inputs)
        self._states = list(ctx.states)
        self.gradients: list[torch.Tensor | None] = []
        """Of the trained parameters, in reverse order."""

    def run(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the hidden states, float32."""
        plan = self._plan
        zero = torch.zeros_like(grad, dtype=torch.float32)
        gradients = [zero, zero]
        gradients[plan.output] = grad.float()
        d1, d2 = gradients
        reverses = not plan.keeps_inputs
        y1, y2 = self._saved[:2] if reverses else (None, None)
        outside = self._ctx.draws.states()
        for coupling in reversed(plan.couplings):
            if coupling.swaps:
                y1, y2, d1, d2 = y2, y1, d2, d1
            y2, d1 = self._undo(y2, coupling.g, y1, d2, d1)
            x2, d2 = self._unshift(y2, coupling.g_bits), d2 * 2.0**-coupling.g_bits
            y1, d2 = self._undo(y1, coupling.f, x2, d1, d2)
            x1, d1 = self._unshift(y1, coupling.f_bits), d1 * 2.0**-coupling.f_bits
            if reverses and plan.history is not None:
                for found, true in zip((x1, x2), plan.history.pop(), strict=True):
                    assert found is not None
                    plan.n_mismatches += int(torch.ne(found, true).sum())
            y1, y2 = x1, x2
        self._ctx.draws.set(outside)
        if reverses:
            self._require_start(y1, y2)
        return d1 + d2

    def _undo(
        self,
        y: torch.Tensor | None,
        block: Block | None,
        read: torch.Tensor | None,
        d: torch.Tensor,
        d_read: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return `y` without what the block added, and the gradient of what the block read.

        Args:
            y: The stream that the block added to; None where inputs are kept.
            block: F or G.
            read: The stream that it read; None where inputs are kept.
            d: The gradient of `y`.
            d_read: The gradient of `read` so far.
        """
        if block is None:
            return y, d_read
        states = self._states.pop()
        if states is not None:
            self._ctx.draws.set([self._saved[place] for place in states])
        place = self._inputs.pop() if read is None else None
        x = from_grid(read, self._ctx.dtype) if read is not None else self._saved[place]
        x = x.detach().requires_grad_()
        found = self._plan.evaluate(block, x)
        gradients = torch.autograd.grad(
            found, (x, *block.parameters), d.to(found.dtype), allow_unused=True
        )
        self.gradients.extend(reversed(gradients[1:]))
        if gradients[0] is not None:
            d_read = d_read + gradients[0].float()
        return y if y is None else y - to_grid(found.detach()), d_read

    def _unshift(self, numbers: torch.Tensor | None, bits: int) -> torch.Tensor | None:
        if numbers is None:
            return None
        place = self._lost.pop()
        return unshift(numbers, bits, None if place is None else self._saved[place])

    def _require_start(self, x1: Any, x2: Any) -> None:
        """Raise `NotReversibleError` unless both streams are the hidden states again.

        A pass with numbers that are not finite is not judged: its loss is NaN.
        """
        is_back = (x1 - x2).any().logical_not() & x1.sum().eq(self._ctx.checksum)
        if not bool(is_back | ~self._ctx.is_finite):
            raise NotReversibleError
