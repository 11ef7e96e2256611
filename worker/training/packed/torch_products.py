"""Products of a pass by PyTorch, one after the other, on any device and in any dtype."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch

from worker.kernels.products import Term
from worker.training.packed import pool
from worker.training.packed.frozen import FrozenWeight, columns_of
from worker.training.packed.products import Part, Products
from worker.training.packed.sums import TorchSums


class Sent(NamedTuple):
    """What a part's products sent back: the gradient of ``A x``, and those of its matrices.

    Of these, `gradients` is the memory of all, and `views` are its parts. Those of A are not there
    yet.
    """

    to_hidden: torch.Tensor
    gradients: torch.Tensor
    views: list[torch.Tensor]


class TorchProducts(Products):
    """Each product is rounded."""

    @staticmethod
    def multiply(
        x: torch.Tensor, weights: Sequence[FrozenWeight], parts: Sequence[Part]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        kept = []
        matrices = [part.by_layer() for part in parts]
        for part, (all_a, _) in zip(parts, matrices, strict=True):
            rows = x[part.rows]
            hidden = pool.empty(x, rows.shape[0], part.columns.rank)
            if part.drop is None:
                torch.mm(rows, _whole(part, all_a).t(), out=hidden)
            else:
                for number, (column, a) in enumerate(zip(part.columns, all_a, strict=True)):
                    torch.mm(_seen(rows, part, number), a.t(), out=hidden[:, column.hidden])
            kept.append(hidden)
        output = pool.empty(x, x.shape[0], sum(weight.outputs for weight in weights))
        for index, (weight, own) in enumerate(columns_of(weights)):
            terms = [Term(x, weight.get().t())]
            for part, hidden, (_, all_b) in zip(parts, kept, matrices, strict=True):
                for column, b in zip(part.columns, all_b, strict=True):
                    if column.index == index:
                        terms.append(Term(hidden[:, column.hidden], b.t(), part.start))
            TorchSums.add_up(terms, output[:, own], bias=weight.bias)
        return output, kept

    @staticmethod
    def send_back(
        gradient: torch.Tensor,
        weights: Sequence[FrozenWeight],
        parts: Sequence[Part],
        kept: Sequence[torch.Tensor],
        *,
        wanted: bool = True,
    ) -> tuple[torch.Tensor | None, list[Sent]]:
        added, all_sent = [], []
        matrices = [part.by_layer() for part in parts]
        for part, hidden, (all_a, all_b) in zip(parts, kept, matrices, strict=True):
            gradients = gradient.new_empty(part.columns.size)
            sent = Sent(torch.empty_like(hidden), gradients, part.columns.views(gradients))
            to_b = sent.views[len(part.columns) :]
            for column, b, out in zip(part.columns, all_b, to_b, strict=True):
                outer = gradient[part.rows, column.output]
                torch.mm(outer, b, out=sent.to_hidden[:, column.hidden])
                torch.mm(outer.t(), hidden[:, column.hidden], out=out)
            if part.drop is None:
                added.append(Term(sent.to_hidden, _whole(part, all_a), part.start))
            all_sent.append(sent)
        if not wanted:
            return None, all_sent
        to_x = pool.empty(gradient, gradient.shape[0], weights[0].inputs)
        frozen = (Term(gradient[:, own], weight.get()) for weight, own in columns_of(weights))
        TorchSums.add_up(chain(frozen, added), to_x)
        for part, sent, (all_a, _) in zip(parts, all_sent, matrices, strict=True):
            if part.drop is not None:
                _add_kept(part, all_a, sent, to_x[part.rows])
        return to_x, all_sent

    @staticmethod
    def matrix_gradients(
        x: torch.Tensor, parts: Sequence[Part], sent: Sequence[Sent]
    ) -> list[torch.Tensor]:
        gradients: list[torch.Tensor] = []
        for part, (to_hidden, flat, views) in zip(parts, sent, strict=True):
            rows, n = x[part.rows], len(part.columns)
            if part.drop is None:
                torch.mm(to_hidden.t(), rows, out=_whole(part, views[:n]))
            else:
                for number, (column, to_a) in enumerate(zip(part.columns, views[:n], strict=True)):
                    torch.mm(to_hidden[:, column.hidden].t(), _seen(rows, part, number), out=to_a)
            wide = views if flat.dtype == torch.float32 else part.columns.views(flat.float())
            factors = [pair.factor(training=part.training) for pair in part.columns.pairs]
            torch._foreach_mul_(wide[:n], factors)
            gradients += wide
        return gradients


def _whole(part: Part, all_a: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return those of a part's layers, which lie one below the other, as one [ranks, inputs]."""
    first = all_a[0]
    return first.as_strided((part.columns.rank, first.shape[1]), first.stride())


def _seen(rows: torch.Tensor, part: Part, number: int) -> torch.Tensor:
    """Return what A of one of the layers sees of its rows."""
    assert part.drop is not None
    return part.drop.zero_(rows.clone(memory_format=torch.contiguous_format), number)


def _add_kept(part: Part, all_a: Sequence[torch.Tensor], sent: Sent, to_x: torch.Tensor) -> None:
    """Add what the matrices of a part with dropout send back to the inputs that it kept."""
    assert part.drop is not None
    for number, (column, a) in enumerate(zip(part.columns, all_a, strict=True)):
        to_rows = pool.empty(to_x, *to_x.shape)
        torch.mm(sent.to_hidden[:, column.hidden], a, out=to_rows)
        to_x.add_(part.drop.zero_(to_rows, number))
