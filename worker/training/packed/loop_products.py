"""Products of a pass in few calls of compiled loops."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from worker.kernels import pairs, products
from worker.kernels.products import NO_MASK, Term, add_up_
from worker.training.packed import pool
from worker.training.packed.frozen import FrozenWeight, columns_of
from worker.training.packed.products import Part, Products

_BYTES = 2
"""Those of a number in bfloat16."""


class Sent(NamedTuple):
    """The gradient of ``A x`` of all parts, and those of all matrices, of which A's are missing."""

    to_hidden: torch.Tensor
    gradients: torch.Tensor


class LoopProducts(Products):
    """Sums in float32, rounded once, or as gradients of matrices not at all."""

    @staticmethod
    def multiply(
        x: torch.Tensor, weights: Sequence[FrozenWeight], parts: Sequence[Part]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden = _hidden_like(x, parts)
        if parts:
            pairs.to_hidden(_told(parts, x=x, hidden=hidden), 2)
        output = pool.empty(x, x.shape[0], sum(weight.outputs for weight in weights))
        for index, (weight, own) in enumerate(columns_of(weights)):
            # Rounded before the adapter's share is added, as everywhere: many small shares are lost
            # by it, and a job whose first steps keep them does not have the losses of others.
            told = _outputs(index, parts, hidden)
            terms = [Term(x, weight.get().t())]
            add_up_(terms, output[:, own], bias=weight.bias, n_rounded=1, told=told)
        return output, [hidden]

    @staticmethod
    def send_back(
        gradient: torch.Tensor,
        weights: Sequence[FrozenWeight],
        parts: Sequence[Part],
        kept: Sequence[torch.Tensor],
        *,
        wanted: bool = True,
    ) -> tuple[torch.Tensor | None, Sent]:
        (hidden,) = kept
        n = sum(part.columns.size for part in parts)
        sent = Sent(_hidden_like(gradient, parts), torch.empty(n, dtype=torch.float32))
        if parts:
            told = _told(parts, outer=gradient, hidden=hidden, sent=sent)
            pairs.send_back(told, 2)
        if not wanted:
            return None, sent
        n_inputs = weights[0].inputs
        to_x = pool.empty(gradient, gradient.shape[0], n_inputs)
        terms = [Term(gradient[:, own], weight.get()) for weight, own in columns_of(weights)]
        add_up_(terms, to_x, told=_inputs(n_inputs, parts, sent.to_hidden))
        return to_x, sent

    @staticmethod
    def matrix_gradients(x: torch.Tensor, parts: Sequence[Part], sent: Sent) -> list[torch.Tensor]:
        if not parts:
            return []
        pairs.to_a(_told(parts, x=x, sent=sent), 2)
        pieces = sent.gradients.split([part.columns.size for part in parts])
        views = (part.columns.views(own) for part, own in zip(parts, pieces, strict=True))
        return [view for several in views for view in several]


def _n_hidden(part: Part) -> int:
    return (part.end - part.start) * part.columns.rank


def _hidden_like(x: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Return memory for ``A x`` of all parts, [tokens, ranks] of each."""
    return pool.empty(x, sum(_n_hidden(part) for part in parts))


def _matrices(part: Part) -> int:
    return part.matrices.data_ptr() + part.columns.start * _BYTES


def _masks(part: Part) -> int:
    return 0 if part.drop is None or part.drop.masks is None else part.drop.masks.data_ptr()


def _told(
    parts: Sequence[Part],
    *,
    x: torch.Tensor | None = None,
    outer: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    sent: Sent | None = None,
) -> list[int]:
    """Return what a loop of `pairs` is told; it does not look at what is omitted.

    Raises:
        ValueError: the numbers of a row are not in one piece.
    """
    numbers = []
    for rows in (x, outer):
        if rows is not None and (rows.stride(1) != 1 or rows.dtype != torch.bfloat16):
            raise ValueError(f"Rows {rows.dtype} with strides {rows.stride()} are not read.")
        numbers += [0, 0] if rows is None else [rows.data_ptr(), rows.stride(0)]
    numbers.insert(2, 0 if x is None else x.shape[1])
    numbers += [len(parts), products.scratch(torch.get_num_threads())]
    place = 0 if hidden is None else hidden.data_ptr()
    to_hidden, gradients = (0, 0) if sent is None else (each.data_ptr() for each in sent)
    for part in parts:
        columns = part.columns
        numbers += (
            *(part.start, part.end - part.start, columns.rank, len(columns)),
            *(columns.table(training=part.training), _matrices(part)),
            *(place, to_hidden, gradients, _masks(part)),
        )
        n_bytes = _n_hidden(part) * _BYTES
        place, to_hidden = place + n_bytes, to_hidden + n_bytes
        gradients += columns.size * 4
    return numbers


def _outputs(index: int, parts: Sequence[Part], hidden: torch.Tensor) -> list[int]:
    """Return the terms ``s · B A x`` of layer `index`, as `add_up_` is told of them."""
    numbers: list[int] = []
    place = hidden.data_ptr()
    for part in parts:
        column = part.columns.of_layer(index)
        if column is not None:
            first, rank = column.hidden.start, column.hidden.stop - column.hidden.start
            numbers += (
                *(place + first * _BYTES, part.columns.rank, 0),
                *(_matrices(part) + column.b * _BYTES, rank, 1),
                *(rank, part.start, part.end, *NO_MASK),
            )
        place += _n_hidden(part) * _BYTES
    return numbers


def _inputs(n_inputs: int, parts: Sequence[Part], to_hidden: torch.Tensor) -> list[int]:
    """Return the terms of the gradient of x that come by each A, as `add_up_` is told of them."""
    numbers: list[int] = []
    place = to_hidden.data_ptr()
    for part in parts:
        rank, matrices, masks = part.columns.rank, _matrices(part), _masks(part)
        span = (part.start, part.end)
        if not masks:  # all layers see the same
            numbers += (place, rank, 0, matrices, n_inputs, 0, rank, *span, *NO_MASK)
        else:
            assert part.drop is not None
            assert part.drop.masks is not None
            _, n_rows, n_words = part.drop.masks.shape
            for number, column in enumerate(part.columns):
                first, n = column.hidden.start, column.hidden.stop - column.hidden.start
                mask = (masks + number * n_rows * n_words * 4, n_words * 4, 1)
                a = (matrices + column.a * _BYTES, n_inputs, 0)
                numbers += (place + first * _BYTES, rank, 0, *a, n, *span, *mask)
        place += _n_hidden(part) * _BYTES
    return numbers
