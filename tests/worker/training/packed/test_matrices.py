"""Casts of adapters' matrices: made once for a pass, for all groups, with their factors."""

import pytest
import torch
from torch import nn

from worker.training.packed import layout
from worker.training.packed.layout import Layout
from worker.training.packed.matrices import Matrices, Pair


def make_pair(rank: int, inputs: int, outputs: int, dropout: float) -> Pair:
    a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    return Pair(nn.Parameter(a), nn.Parameter(b), 1.7, dropout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_matrices_of_all_groups_are_cast_where_their_columns_say(
    dtype: torch.dtype, training: bool
) -> None:
    torch.manual_seed(0)
    matrices = Matrices()
    rows: list[dict[str, list[Pair | None]]] = [
        {"one": [make_pair(3, 8, 5, 0.5), None, make_pair(2, 8, 7, 0.0)], "two": [None] * 3},
        {"one": [make_pair(4, 6, 9, 0.5)], "two": [make_pair(1, 6, 9, 0.0)]},
    ]
    groups = [
        matrices.add(outputs, row) for outputs, row in zip([(5, 6, 7), (9,)], rows, strict=True)
    ]
    assert [set(group) for group in groups] == [{"one"}, {"one", "two"}]
    with layout.active(Layout.of([1], "one")):
        cast = matrices.cast("one", torch.ones(1, dtype=dtype), training=training)
    for group in groups:
        columns = group["one"]
        views = columns.views(cast[columns.start : columns.start + columns.size])
        for column, a, b in zip(columns, views[: len(columns)], views[len(columns) :], strict=True):
            pair = column.pair
            factor = 1.7 / (1 - pair.dropout) if training else 1.7
            assert torch.equal(a, (pair.a.detach() * factor).to(dtype))
            assert torch.equal(b, pair.b.detach().to(dtype))
            own = cast[columns.start + column.a :][: a.numel()]
            assert torch.equal(own, a.flatten())
            own = cast[columns.start + column.b :][: b.numel()]
            assert torch.equal(own, b.flatten())
    assert groups[0]["one"].of_layer(1) is None
    third = groups[0]["one"].of_layer(2)
    assert third is not None
    assert (third.output, third.hidden) == (slice(11, 18), slice(3, 5))


def test_a_cast_is_made_once_for_a_layout_and_anew_for_the_next() -> None:
    matrices, pair = Matrices(), make_pair(2, 4, 3, 0.0)
    matrices.add((3,), {"one": [pair]})
    like = torch.ones(1)
    with layout.active(Layout.of([1], "one")):
        first = matrices.cast("one", like, training=True)
        assert matrices.cast("one", like, training=True) is first
    with torch.no_grad():
        pair.b.add_(1)
    with layout.active(Layout.of([1], "one")):
        second = matrices.cast("one", like, training=True)
    torch.testing.assert_close(second[8:], first[8:] + 1)
