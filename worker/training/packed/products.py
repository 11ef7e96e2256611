"""Products with frozen weights and with adapters' matrices, forward and backward, for `lora`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import nn

from worker.kernels.products import Term
from worker.training.dropout import Drop
from worker.training.packed import pool, sums
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
    how = sums.of(x)
    hidden_of_parts = []
    for part in parts:
        rows = x[part.rows]
        hidden = pool.empty(x, rows.shape[0], part.a.shape[0])
        if part.drops is None:
            how.add_up([Term(rows, part.a.t())], hidden)
        else:
            for column, drop in zip(part.columns, part.drops, strict=True):
                a = part.a[column.hidden].t()
                how.add_up([Term(_kept(rows, drop), a)], hidden[:, column.hidden])
        hidden_of_parts.append(hidden)
    output = pool.empty(x, x.shape[0], sum(weight.outputs for weight in weights))
    for weight, columns in _columns(weights):
        terms = [Term(x, weight.get().t())]
        for part, hidden in zip(parts, hidden_of_parts, strict=True):
            terms += [
                Term(hidden[:, column.hidden], b.t(), part.rows.start)
                for column, b in zip(part.columns, part.b, strict=True)
                if column.output == columns
            ]
        # Rounded before the adapter's share is added, as everywhere: many small shares are lost by
        # it, and a job whose first steps keep them does not have the losses that others have.
        how.add_up(terms, output[:, columns], bias=weight.bias, n_rounded=1)
    return output, hidden_of_parts


def _columns(weights: list[FrozenWeight]) -> list[tuple[FrozenWeight, slice]]:
    ends = accumulate((weight.outputs for weight in weights), initial=0)
    return [(weight, slice(*span)) for weight, span in zip(weights, pairwise(ends), strict=True)]


@dataclass(frozen=True, slots=True)
class Sent:
    """What a part's products sent back: the gradient of ``s · A x``, and those of its matrices.

    Of these, `gradients` is the memory of all, and `to_a` and `to_b` are its parts. Those of A are
    not there yet.
    """

    to_hidden: torch.Tensor
    gradients: torch.Tensor
    to_a: list[torch.Tensor]
    to_b: list[torch.Tensor]


def send_back(
    gradient: torch.Tensor,
    weights: list[FrozenWeight],
    parts: list[Part],
    hidden_of_parts: list[torch.Tensor],
    *,
    wanted: bool = True,
) -> tuple[torch.Tensor | None, list[Sent]]:
    """Return the gradient of what `multiply` was given, and what `matrix_gradients` needs.

    Args:
        gradient: Of the outputs [T, all outputs].
        weights: Those of the product.
        parts: Those of the product.
        hidden_of_parts: As `multiply` returned it.
        wanted: Whether the input needs a gradient; None is returned if not.
    """
    how = sums.of(gradient)
    added, all_sent = [], []
    for part, hidden in zip(parts, hidden_of_parts, strict=True):
        matrices = [column.pair.a for column in part.columns]
        matrices += [column.pair.b for column in part.columns]
        gradients = how.gradients(gradient, sum(each.numel() for each in matrices))
        views = _views(gradients, matrices)
        n = len(part.columns)
        to_hidden = pool.empty(hidden, *hidden.shape)
        sent = Sent(to_hidden, gradients, views[:n], views[n:])
        for column, b, to_b in zip(part.columns, part.b, sent.to_b, strict=True):
            outer, own = gradient[part.rows, column.output], column.hidden
            how.add_up([Term(outer, b)], to_hidden[:, own])
            how.add_up([Term(hidden[:, own].t(), outer)], to_b.t())
        if part.drops is None:
            added.append(Term(to_hidden, part.a, part.rows.start))
        all_sent.append(sent)
    if not wanted:
        return None, all_sent
    to_x = pool.empty(gradient, gradient.shape[0], weights[0].inputs)
    frozen = (Term(gradient[:, own], weight.get()) for weight, own in _columns(weights))
    how.add_up(chain(frozen, added), to_x)
    for part, sent in zip(parts, all_sent, strict=True):
        if part.drops is not None:
            _add_kept(part, sent, to_x[part.rows])
    return to_x, all_sent


def _add_kept(part: Part, sent: Sent, to_x: torch.Tensor) -> None:
    """Add what the matrices of a part with dropout send back to the inputs that it kept."""
    assert part.drops is not None
    for column, drop in zip(part.columns, part.drops, strict=True):
        to_rows = pool.empty(to_x, *to_x.shape)
        a = part.a[column.hidden]
        sums.of(to_x).add_up([Term(sent.to_hidden[:, column.hidden], a)], to_rows)
        to_x.add_(to_rows if drop is None else drop.zero_(to_rows))


def matrix_gradients(
    x: torch.Tensor, parts: list[Part], all_sent: list[Sent]
) -> list[torch.Tensor]:
    """Return the gradients of A and B of each part, float32, for x [T, inputs]."""
    how = sums.of(x)
    gradients: list[torch.Tensor] = []
    for part, sent in zip(parts, all_sent, strict=True):
        rows = x[part.rows]
        if part.drops is None:
            n = sum(each.numel() for each in sent.to_a)
            all_a = sent.gradients[:n].view(part.a.shape)
            how.add_up([Term(sent.to_hidden.t(), rows)], all_a)
        else:
            for column, drop, to_a in zip(part.columns, part.drops, sent.to_a, strict=True):
                to_hidden = sent.to_hidden[:, column.hidden].t()
                how.add_up([Term(to_hidden, _kept(rows, drop))], to_a)
        found = [*sent.to_a, *sent.to_b]
        if sent.gradients.dtype != torch.float32:
            found = _views(sent.gradients.float(), found)
        torch._foreach_mul_(found[: len(sent.to_a)], part.factors)
        gradients += found
    return gradients
