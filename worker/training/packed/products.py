"""Products with frozen weights and with adapters' matrices, forward and backward, for `lora`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn

from worker.training.dropout import Drop
from worker.training.packed import pool
from worker.training.packed.frozen import FrozenWeight


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapter's matrices of one layer: A [r, inputs], B [outputs, r], float32."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Column:
    """One layer of a group: its pair, the columns of its output, and those of its ``A x``."""

    pair: Pair
    output: slice
    hidden: slice


@dataclass(frozen=True, slots=True)
class Part:
    """One segment: its rows, its layers, and their matrices in the dtype of the product.

    `a` are all A times their factors, one below the other, and `b` the B of each layer. `drops`
    says what each layer's dropout drops in this pass, if there is any. It comes from a seed by
    torch's generator, whose state is part of a checkpoint; what is kept is scaled with the rest.
    """

    rows: slice
    columns: list[Column]
    a: torch.Tensor
    b: Sequence[torch.Tensor]
    drops: list[Drop | None] | None

    @classmethod
    def of(
        cls,
        rows: slice,
        columns: list[Column],
        like: torch.Tensor,
        drops: list[Drop | None] | None,
    ) -> "Part":
        """Cast the matrices of these layers to the dtype of `like`.

        A fused optimizer changes weights without telling, so no cast outlives its pass.
        """
        all_a = [column.pair.a.detach() for column in columns]
        all_b = [column.pair.b.detach() for column in columns]
        flat = like.new_empty(sum(each.numel() for each in (*all_a, *all_b)))
        casts = _views(flat, [*all_a, *all_b])
        # In one call each: there are hundreds of these, and they are small.
        scaled = torch._foreach_mul(all_a, _factors(columns, drops))
        torch._foreach_copy_(casts, [*scaled, *all_b])
        rank = columns[-1].hidden.stop
        a = flat[: rank * all_a[0].shape[1]].view(rank, -1)
        return cls(rows, columns, a, casts[len(columns) :], drops)

    @property
    def factors(self) -> list[float]:
        return _factors(self.columns, self.drops)


def _factors(columns: list[Column], drops: list[Drop | None] | None) -> list[float]:
    """Return by what each layer's A is multiplied: with dropout, over the share that is kept."""
    pairs = [column.pair for column in columns]
    if drops is None:
        return [pair.scale for pair in pairs]
    return [pair.scale / (1 - pair.dropout) for pair in pairs]


def _views(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return parts of flat [all numbers], one after the other, shaped as `like`."""
    pieces = flat.split([each.numel() for each in like])
    return [piece.view(each.shape) for piece, each in zip(pieces, like, strict=True)]


def _kept(rows: torch.Tensor, drop: Drop | None) -> torch.Tensor:
    return rows if drop is None else drop.zero_(rows.clone(memory_format=torch.contiguous_format))


def multiply(
    x: torch.Tensor, weights: list[FrozenWeight], parts: list[Part]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the outputs [T, all outputs] for x [T, inputs], and ``s · A x`` of each part."""
    output = pool.empty(x, x.shape[0], sum(weight.outputs for weight in weights))
    for weight, columns in _columns(weights):
        torch.mm(x, weight.get().t(), out=output[:, columns])
        if weight.bias is not None:
            output[:, columns].add_(weight.bias)
    hidden_of_parts = []
    for part in parts:
        rows = x[part.rows]
        hidden = pool.empty(rows, len(rows), part.a.shape[0])
        if part.drops is None:
            torch.mm(rows, part.a.t(), out=hidden)
        else:
            for column, drop in zip(part.columns, part.drops, strict=True):
                a = part.a[column.hidden]
                torch.mm(_kept(rows, drop), a.t(), out=hidden[:, column.hidden])
        for column, b in zip(part.columns, part.b, strict=True):
            output[part.rows, column.output].addmm_(hidden[:, column.hidden], b.t())
        hidden_of_parts.append(hidden)
    return output, hidden_of_parts


def _columns(weights: list[FrozenWeight]) -> list[tuple[FrozenWeight, slice]]:
    ends = accumulate((weight.outputs for weight in weights), initial=0)
    return [(weight, slice(*span)) for weight, span in zip(weights, pairwise(ends), strict=True)]


@dataclass(frozen=True, slots=True)
class Sent:
    """What a part's products sent back: the gradient of ``s · A x``, and those of its matrices.

    Of these, `gradients` is the memory of all, in the dtype of the product, and `to_a` and `to_b`
    are its parts. Those of A are not there yet.
    """

    to_hidden: torch.Tensor
    gradients: torch.Tensor
    to_a: list[torch.Tensor]
    to_b: list[torch.Tensor]


def send_back(
    gradient: torch.Tensor,
    weights: list[FrozenWeight] | None,
    parts: list[Part],
    hidden_of_parts: list[torch.Tensor],
) -> tuple[torch.Tensor | None, list[Sent]]:
    """Return the gradient of what `multiply` was given, and what `matrix_gradients` needs.

    Args:
        gradient: Of the outputs [T, all outputs].
        weights: Those of the product; None if the input needs no gradient.
        parts: Those of the product.
        hidden_of_parts: As `multiply` returned it.
    """
    to_x = None if weights is None else _input_gradient(gradient, weights)
    all_sent = []
    for part, hidden in zip(parts, hidden_of_parts, strict=True):
        matrices = [column.pair.a for column in part.columns]
        matrices += [column.pair.b for column in part.columns]
        gradients = gradient.new_empty(sum(each.numel() for each in matrices))
        views = _views(gradients, matrices)
        n = len(part.columns)
        sent = Sent(pool.empty(hidden, *hidden.shape), gradients, views[:n], views[n:])
        for column, b, to_b in zip(part.columns, part.b, sent.to_b, strict=True):
            outer = gradient[part.rows, column.output]
            torch.mm(outer, b, out=sent.to_hidden[:, column.hidden])
            torch.mm(outer.t(), hidden[:, column.hidden], out=to_b)
        if to_x is not None:
            _add_to_input(part, sent.to_hidden, to_x[part.rows])
        all_sent.append(sent)
    return to_x, all_sent


def _input_gradient(gradient: torch.Tensor, weights: list[FrozenWeight]) -> torch.Tensor:
    """Return what the frozen weights send back, [T, inputs]."""
    (first, columns), *others = _columns(weights)
    to_x = pool.empty(gradient, len(gradient), first.inputs)
    torch.mm(gradient[:, columns], first.get(), out=to_x)
    for weight, columns in others:
        to_x.addmm_(gradient[:, columns], weight.get())
    return to_x


def _add_to_input(part: Part, to_hidden: torch.Tensor, to_x: torch.Tensor) -> None:
    if part.drops is None:
        to_x.addmm_(to_hidden, part.a)
        return
    for column, drop in zip(part.columns, part.drops, strict=True):
        to_rows = to_hidden[:, column.hidden] @ part.a[column.hidden]
        to_x.add_(to_rows if drop is None else drop.zero_(to_rows))


def matrix_gradients(
    x: torch.Tensor, parts: list[Part], all_sent: list[Sent]
) -> list[torch.Tensor]:
    """Return the gradients of A and B of each part, float32, for x [T, inputs]."""
    gradients: list[torch.Tensor] = []
    for part, sent in zip(parts, all_sent, strict=True):
        rows = x[part.rows]
        if part.drops is None:
            n = sum(each.numel() for each in sent.to_a)
            all_a = sent.gradients[:n].view(part.a.shape)
            torch.mm(sent.to_hidden.t(), rows, out=all_a)
        else:
            for column, drop, to_a in zip(part.columns, part.drops, sent.to_a, strict=True):
                torch.mm(sent.to_hidden[:, column.hidden].t(), _kept(rows, drop), out=to_a)
        found = _views(sent.gradients.float(), [*sent.to_a, *sent.to_b])
        torch._foreach_mul_(found[: len(sent.to_a)], part.factors)
        gradients += found
    return gradients
