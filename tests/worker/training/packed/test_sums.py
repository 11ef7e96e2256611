"""Both ways of adding products up give the formula, and for a group of layers the same."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.worker.training.packed.test_lora import matrices_of
from worker.kernels import tiles
from worker.kernels.products import Term
from worker.training.packed import layout, sums
from worker.training.packed.frozen import FrozenWeight
from worker.training.packed.layout import Layout, Segment
from worker.training.packed.lora import LinearGroup
from worker.training.packed.products import Pair
from worker.training.packed.sums import LoopSums, Sums, TorchSums

NEEDS_LOOPS = pytest.mark.skipif(
    not tiles.is_supported(), reason="this processor has no AVX512-BF16"
)
WAYS = pytest.mark.parametrize("how", [TorchSums, pytest.param(LoopSums, marks=NEEDS_LOOPS)])
INPUTS, OUTPUTS, ROWS = 64, (48, 16, 16), 40


@WAYS
def test_the_first_term_has_all_rows_and_others_are_added(how: type[Sums]) -> None:
    torch.manual_seed(0)
    x, w, bias = (torch.randn(shape).bfloat16() for shape in ((10, 8), (8, 6), (6,)))
    more, matrix = torch.randn(4, 2).bfloat16(), torch.randn(2, 6).bfloat16()
    out = torch.empty(10, 6, dtype=torch.bfloat16)
    how.add_up([Term(x, w), Term(more, matrix, 5)], out, bias=bias, n_rounded=1)
    exact = x.double() @ w.double() + bias.double()
    exact[5:9] += more.double() @ matrix.double()
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def test_loops_are_for_bfloat16_where_there_is_the_instruction() -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    assert sums.of(x) is (LoopSums if tiles.is_supported() else TorchSums)
    assert sums.of(x.float()) is TorchSums


def make_group(dropout: float) -> LinearGroup:
    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, outputs).bfloat16().requires_grad_(False) for outputs in OUTPUTS]
    pairs = {
        name: tuple(
            Pair(
                nn.Parameter(torch.randn(rank, INPUTS) / 8),
                nn.Parameter(torch.randn(outputs, rank) / 8),
                2.0,
                dropout,
            )
            if outputs > number
            else None
            for outputs in OUTPUTS
        )
        for number, (name, rank) in enumerate({"one": 4, "two": 5}.items())
    }
    return LinearGroup([FrozenWeight(layer, cache=False) for layer in layers], pairs)


@NEEDS_LOOPS
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("lengths", [(25, 15), (1, 39)])
def test_a_group_has_the_outputs_and_gradients_of_both_ways(
    dropout: float, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(dropout)
    parameters = matrices_of(group)
    first, second = lengths
    rows = Layout(list(lengths), (Segment(0, first, "one"), Segment(first, ROWS, "two")))
    assert first + second == ROWS
    x = torch.randn(1, ROWS, INPUTS).bfloat16().requires_grad_()
    outer = torch.randn(1, ROWS, sum(OUTPUTS)).bfloat16()
    found = []
    for how in (TorchSums, LoopSums):
        monkeypatch.setattr(sums, "of", lambda x, how=how: how)
        torch.manual_seed(3)  # of dropout
        with layout.active(rows):
            output = group(x, training=True)
        found.append([output, *torch.autograd.grad(output, [x, *parameters], outer)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        exact, own = one.detach().double(), other.detach().double()
        assert float((exact - own).norm() / exact.norm()) < 6e-3


def test_torch_takes_one_term_after_the_other_and_keeps_none() -> None:
    there: list[weakref.ref[torch.Tensor]] = []

    def terms() -> Iterator[Term]:
        for _ in range(3):
            assert all(each() is None for each in there)
            w = torch.ones(4, 5)
            there.append(weakref.ref(w))
            yield Term(torch.ones(2, 4), w)
            del w

    out = torch.empty(2, 5)
    TorchSums.add_up(terms(), out)
    assert torch.equal(out, torch.full((2, 5), 12.0))
