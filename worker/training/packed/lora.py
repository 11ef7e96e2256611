"""LoRA on linear layers that read the same input, as one node of the graph.

For each layer ``y = W x + b + s · B A dropout(x)`` (arXiv 2106.09685, equation 3). Compared with
the same in separate modules: no gradient of W or b is ever formed, only x and A x are kept for the
backward pass, and where x needs no gradient (below the first adapter) none is computed. The rows of
a batch may belong to different adapters.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from worker.training.dropout import Drop, draw_seed, seeded
from worker.training.packed import layout, pool
from worker.training.packed.frozen import FrozenWeight
from worker.training.packed.layout import Segment


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapter's matrices of one layer: A [r, inputs], B [outputs, r], float32."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float


class LinearGroup:
    """Layers with one input: their frozen weights, and the pairs of each adapter by its name."""

    def __init__(
        self, weights: list[FrozenWeight], pairs: dict[str, tuple[Pair | None, ...]]
    ) -> None:
        self.weights = weights
        self.outputs = [weight.outputs for weight in weights]
        self.pairs = pairs
        self._columns = {name: _columns_of(self.outputs, row) for name, row in pairs.items()}

    def __call__(self, x: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Return [..., all outputs] for x [..., inputs] under the active layout."""
        parts, parameters = self._parts(x, training)
        output: torch.Tensor = _Product.apply(x, self.weights, parts, *parameters)
        return output

    def gated(self, both: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Return the products of ``silu(gate) · up`` for both [..., 2 · inputs], side by side.

        The gated feed-forward of arXiv 2002.05202. Its activation is made again in the backward
        pass instead of being kept.
        """
        parts, parameters = self._parts(both, training)
        output: torch.Tensor = _GatedProduct.apply(both, self.weights, parts, *parameters)
        return output

    def _parts(self, like: torch.Tensor, training: bool) -> tuple[list["_Part"], list[Any]]:
        """Return what each segment is multiplied with, and the parameters behind it."""
        parts, parameters = [], []
        for segment in layout.current().segments:
            columns = self._columns.get(segment.adapter)  # others may have matrices here
            if not columns:
                continue
            a = [column.pair.a for column in columns]
            b = [column.pair.b for column in columns]
            # A fused optimizer changes weights without telling, so no cast outlives its pass.
            parts.append(
                _Part(
                    slice(segment.start, segment.end),
                    columns,
                    [each.detach().to(like.dtype) for each in a],
                    [each.detach().to(like.dtype) for each in b],
                    self._drops(segment, columns, like.device) if training else None,
                )
            )
            parameters += [*a, *b]
        return parts, parameters

    def _drops(
        self, segment: Segment, columns: list["_Column"], device: torch.device
    ) -> list[Drop | None] | None:
        """Choose the inputs that each layer's A does not see; None if none drops any."""
        if not any(column.pair.dropout for column in columns):
            return None
        random = seeded(draw_seed(segment.generator))
        n = (segment.end - segment.start) * self.weights[0].inputs
        return [
            Drop(n, column.pair.dropout, random, device) if column.pair.dropout else None
            for column in columns
        ]


@dataclass(frozen=True, slots=True)
class _Column:
    """One layer of a group: its pair, the columns of its output, and those of its ``A x``."""

    pair: Pair
    output: slice
    hidden: slice


def _columns_of(outputs: list[int], pairs: tuple[Pair | None, ...]) -> list[_Column]:
    columns = []
    output = hidden = 0
    for width, pair in zip(outputs, pairs, strict=True):
        if pair is not None:
            rank = pair.a.shape[0]
            columns.append(
                _Column(pair, slice(output, output + width), slice(hidden, hidden + rank))
            )
            hidden += rank
        output += width
    return columns


@dataclass(frozen=True, slots=True)
class _Part:
    """One segment: its rows, its layers, and their matrices in the dtype of the product.

    `drops` says what each layer's dropout drops in this pass, if there is any. It comes from a seed
    by torch's generator, whose state is part of a checkpoint; what is kept is scaled with the rest.
    """

    rows: slice
    columns: list[_Column]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    drops: list[Drop | None] | None

    @property
    def scales(self) -> list[float]:
        """The factor of each layer's product: with dropout, over the share that is kept."""
        pairs = [column.pair for column in self.columns]
        if self.drops is None:
            return [pair.scale for pair in pairs]
        return [pair.scale / (1 - pair.dropout) for pair in pairs]


def _kept(rows: torch.Tensor, drop: Drop | None) -> torch.Tensor:
    return rows if drop is None else drop.zero_(rows.clone(memory_format=torch.contiguous_format))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: list[FrozenWeight], parts: list[_Part], *_: Any
    ) -> torch.Tensor:
        flat = x.reshape(-1, weights[0].inputs)
        output, hidden = _multiply(flat, weights, parts)
        ctx.save_for_backward(flat, *hidden)
        ctx.weights, ctx.parts, ctx.shape = weights, parts, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        flat, *hidden = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        to_x = _input_gradient(gradient, ctx.weights) if ctx.needs_input_grad[0] else None
        gradients = _adapter_gradients(flat, gradient, ctx.parts, hidden, to_x)
        return (to_x.view(ctx.shape) if to_x is not None else None, None, None, *gradients)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, both: torch.Tensor, weights: list[FrozenWeight], parts: list[_Part], *_: Any
    ) -> torch.Tensor:
        flat = both.reshape(-1, both.shape[-1])
        gate, up = flat.chunk(2, -1)
        output, hidden = _multiply(_silu(gate).mul_(up), weights, parts)
        ctx.save_for_backward(flat, *hidden)
        ctx.weights, ctx.parts, ctx.shape = weights, parts, both.shape
        return output.view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        flat, *hidden = ctx.saved_tensors
        gate, up = flat.chunk(2, -1)
        gradient = gradient.reshape(-1, gradient.shape[-1])
        active = _silu(gate)
        to_product = _input_gradient(gradient, ctx.weights)
        product = torch.mul(active, up, out=pool.empty(active, *active.shape))
        gradients = _adapter_gradients(product, gradient, ctx.parts, hidden, to_product)
        to_both = pool.empty(flat, *flat.shape)
        to_gate, to_up = to_both.chunk(2, -1)
        torch.mul(to_product, active, out=to_up)
        torch.ops.aten.silu_backward.grad_input(to_product.mul_(up), gate, grad_input=to_gate)
        return to_both.view(ctx.shape), None, None, *gradients


def _silu(x: torch.Tensor) -> torch.Tensor:
    """Return the contiguous silu(x)."""
    active: torch.Tensor = torch.ops.aten.silu.out(x, out=pool.empty(x, *x.shape))
    return active


def _multiply(
    x: torch.Tensor, weights: list[FrozenWeight], parts: list[_Part]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the outputs [T, all outputs] for x [T, inputs], and ``A x`` of each part."""
    output = pool.empty(x, x.shape[0], sum(weight.outputs for weight in weights))
    for weight, columns in _columns(weights):
        torch.mm(x, weight.get().t(), out=output[:, columns])
        if weight.bias is not None:
            output[:, columns].add_(weight.bias)
    hidden_of_parts = []
    for part in parts:
        rows = x[part.rows]
        hidden = pool.empty(rows, len(rows), part.columns[-1].hidden.stop)
        if part.drops is None:
            torch.mm(rows, torch.cat(part.a).t(), out=hidden)
        else:
            for column, a, drop in zip(part.columns, part.a, part.drops, strict=True):
                torch.mm(_kept(rows, drop), a.t(), out=hidden[:, column.hidden])
        for column, b, scale in zip(part.columns, part.b, part.scales, strict=True):
            output[part.rows, column.output].addmm_(hidden[:, column.hidden], b.t(), alpha=scale)
        hidden_of_parts.append(hidden)
    return output, hidden_of_parts


def _columns(weights: list[FrozenWeight]) -> list[tuple[FrozenWeight, slice]]:
    ends = accumulate((weight.outputs for weight in weights), initial=0)
    return [(weight, slice(*span)) for weight, span in zip(weights, pairwise(ends), strict=True)]


def _input_gradient(gradient: torch.Tensor, weights: list[FrozenWeight]) -> torch.Tensor:
    """Return what the frozen weights send back, [T, inputs]."""
    (first, columns), *others = _columns(weights)
    to_x = pool.empty(gradient, len(gradient), first.inputs)
    torch.mm(gradient[:, columns], first.get(), out=to_x)
    for weight, columns in others:
        to_x.addmm_(gradient[:, columns], weight.get())
    return to_x


def _adapter_gradients(
    x: torch.Tensor,
    gradient: torch.Tensor,
    parts: list[_Part],
    hidden_of_parts: list[torch.Tensor],
    to_x: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Return the gradients of A and B of each part, and add what the adapters send to `to_x`."""
    gradients: list[torch.Tensor] = []
    for part, hidden in zip(parts, hidden_of_parts, strict=True):
        to_hidden = torch.empty_like(hidden)
        to_b = []
        for column, b, scale in zip(part.columns, part.b, part.scales, strict=True):
            outer = gradient[part.rows, column.output]
            to_hidden[:, column.hidden] = (outer @ b).mul_(scale)
            to_b.append((outer.t() @ hidden[:, column.hidden]).float().mul_(scale))
        back = to_x[part.rows] if to_x is not None else None
        gradients += [*_down_gradients(part, x[part.rows], to_hidden, back), *to_b]
    return gradients


def _down_gradients(
    part: _Part, rows: torch.Tensor, to_hidden: torch.Tensor, back: torch.Tensor | None
) -> list[torch.Tensor]:
    """Return the gradients of the A of a part, and add that of its input to `back`."""
    if part.drops is None:
        if back is not None:
            back.addmm_(to_hidden, torch.cat(part.a))
        to_a = (to_hidden.t() @ rows).float()
        return [to_a[column.hidden] for column in part.columns]
    gradients = []
    for column, a, drop in zip(part.columns, part.a, part.drops, strict=True):
        mine = to_hidden[:, column.hidden]
        gradients.append((mine.t() @ _kept(rows, drop)).float())
        if back is not None:
            to_rows = mine @ a
            back.add_(to_rows if drop is None else drop.zero_(to_rows))
    return gradients
