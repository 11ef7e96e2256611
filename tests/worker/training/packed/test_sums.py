"""Both ways of adding products up give the formula."""

import weakref
from collections.abc import Iterator

import pytest
import torch

from tests.worker.training.packed.test_ways import NEEDS_LOOPS
from worker.kernels import tiles
from worker.kernels.products import Term
from worker.training.packed import sums
from worker.training.packed.sums import LoopSums, Sums, TorchSums

WAYS = pytest.mark.parametrize("how", [TorchSums, pytest.param(LoopSums, marks=NEEDS_LOOPS)])


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
