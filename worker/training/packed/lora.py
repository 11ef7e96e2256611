"""LoRA on linear layers that read the same input, as one node of the graph.

For each layer ``y = W x + b + s · B A dropout(x)`` (arXiv 2106.09685, equation 3). Compared with
the same in separate modules: W is read once for all siblings, no gradient of W or b is ever formed,
only x and A x are kept for the backward pass, and where x needs no gradient (below the first
adapter) none is computed. The rows of a batch may belong to different adapters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from worker.training.dropout import keep_scale
from worker.training.packed import layout
from worker.training.packed.frozen import FrozenWeight


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapter's matrices of one layer: A [r, inputs], B [outputs, r], float32."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float


class LinearGroup:
    """Layers with one input: their frozen weights, and the pairs of each adapter by its name."""

    def __init__(self, frozen: FrozenWeight, pairs: dict[str, tuple[Pair | None, ...]]) -> None:
        self.frozen = frozen
        self.pairs = pairs
        self._columns = {name: _columns_of(frozen.outputs, row) for name, row in pairs.items()}

    def __call__(self, x: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Return [..., all outputs] for x [..., inputs] under the active layout."""
        parts, parameters = [], []
        for segment in layout.current().segments:
            columns = self._columns[segment.adapter]
            if not columns:
                continue
            drops = training and any(column.pair.dropout for column in columns)
            seed = int(torch.empty((), dtype=torch.int64).random_().item()) if drops else None
            a = [column.pair.a for column in columns]
            b = [column.pair.b for column in columns]
            # A fused optimizer changes weights without telling, so no cast outlives its pass.
            cast = _Cast(
                torch.cat([each.detach() for each in a]).to(x.dtype), _cast_all(b, x.dtype)
            )
            parts.append(_Part(segment.start, segment.end, columns, cast, seed))
            parameters += [*a, *b]
        output: torch.Tensor = _Product.apply(x, self.frozen, parts, *parameters)
        return output


def _columns_of(outputs: list[int], pairs: tuple[Pair | None, ...]) -> list["_Column"]:
    """Return the pairs of an adapter with the places of their outputs and hidden values."""
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


def _cast_all(matrices: list[nn.Parameter], dtype: torch.dtype) -> list[torch.Tensor]:
    return [matrix.detach().to(dtype) for matrix in matrices]


@dataclass(frozen=True, slots=True)
class _Cast:
    """The A of several layers, stacked, and their B, in the dtype of the product."""

    a: torch.Tensor
    b: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Column:
    """One layer of a group: its pair, the columns of its output, and those of its ``A x``."""

    pair: Pair
    output: slice
    hidden: slice


@dataclass(frozen=True, slots=True)
class _Part:
    """One segment; `seed` starts the random numbers of its dropout, if there is any.

    The seed comes from torch's generator, whose state is part of a checkpoint. The backward pass
    draws the same numbers again, which is cheaper than keeping them.
    """

    start: int
    end: int
    columns: list[_Column]
    cast: _Cast
    seed: int | None

    def keeps(self, rows: torch.Tensor) -> Iterator[torch.Tensor | float]:
        """Yield what each layer's input is multiplied with."""
        assert self.seed is not None
        generator = torch.Generator(rows.device).manual_seed(self.seed)
        for column in self.columns:
            p = column.pair.dropout
            yield keep_scale(rows, p, generator) if p else 1.0


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, frozen: FrozenWeight, parts: list[_Part], *_: Any
    ) -> torch.Tensor:
        flat = x.reshape(-1, frozen.inputs)
        weight = frozen.get()
        if frozen.bias is None:
            output = flat @ weight.t()
        else:
            output = torch.addmm(frozen.bias, flat, weight.t())
        saved = [flat]
        for part in parts:
            rows, a, b = flat[part.start : part.end], part.cast.a, part.cast.b
            if part.seed is None:
                hidden = rows @ a.t()
            else:
                hidden = torch.cat(
                    [
                        (rows * keep) @ a[column.hidden].t()
                        for column, keep in zip(part.columns, part.keeps(rows), strict=True)
                    ],
                    1,
                )
            for column, up in zip(part.columns, b, strict=True):
                output[part.start : part.end, column.output].addmm_(
                    hidden[:, column.hidden], up.t(), alpha=column.pair.scale
                )
            saved.append(hidden)
        ctx.save_for_backward(*saved)
        ctx.frozen, ctx.parts, ctx.shape = frozen, parts, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        flat, *hidden_of_parts = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        to_x = gradient @ ctx.frozen.get() if ctx.needs_input_grad[0] else None
        gradients: list[torch.Tensor] = []
        for part, hidden in zip(ctx.parts, hidden_of_parts, strict=True):
            rows, span = flat[part.start : part.end], slice(part.start, part.end)
            to_hidden = torch.empty_like(hidden)
            to_b = []
            for column, up in zip(part.columns, part.cast.b, strict=True):
                outer = gradient[span, column.output]
                to_hidden[:, column.hidden] = (outer @ up).mul_(column.pair.scale)
                to_b.append((outer.t() @ hidden[:, column.hidden]).float())
                to_b[-1].mul_(column.pair.scale)
            back = to_x[span] if to_x is not None else None
            gradients += [*_down_gradients(part, rows, to_hidden, back), *to_b]
        return (to_x.view(ctx.shape) if to_x is not None else None, None, None, *gradients)


def _down_gradients(
    part: _Part,
    rows: torch.Tensor,
    to_hidden: torch.Tensor,
    back: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Return the gradients of the A of a part, and add that of its input to `back`."""
    a = part.cast.a
    if part.seed is None:
        if back is not None:
            back.addmm_(to_hidden, a)
        to_a = (to_hidden.t() @ rows).float()
        return [to_a[column.hidden] for column in part.columns]
    gradients = []
    for column, keep in zip(part.columns, part.keeps(rows), strict=True):
        mine = to_hidden[:, column.hidden]
        gradients.append((mine.t() @ (rows * keep)).float())
        if back is not None:
            back.add_((mine @ a[column.hidden]).mul_(keep))
    return gradients
