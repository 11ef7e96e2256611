"""Products in bfloat16 by tiles: those of float64, for any sizes, a row by itself."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from worker.kernels import Numbers, linear, order, tiles
from worker.kernels.matrix import COLUMNS, LowRank, Matrix, Rows, add_packed_, in_order, part
from worker.kernels.operators import compile_

pytestmark = pytest.mark.skipif(
    not tiles.is_supported(), reason="this processor has no AVX512-BF16"
)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize(("n_in", "n_out"), [(2, 1), (6, 47), (64, 48), (30, 49), (576, 300)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_any_number_of_tokens_are_rounded_once(
    n_in: int, n_out: int, n_threads: int, has_bias: bool
) -> None:
    torch.set_num_threads(n_threads)
    weight = torch.randn(n_out, n_in).bfloat16()
    bias = torch.randn(n_out).bfloat16() if has_bias else None
    matrix = Matrix(weight, bias)
    assert torch.equal(matrix.dense(), weight)
    whole = torch.randn(37, n_in).bfloat16()
    exact = whole.double() @ weight.double().T + (0 if bias is None else bias.double())
    together = matrix(whole)
    assert float((together.double() - exact).norm() / exact.norm()) < 3e-3
    for n in (1, 2, 3, 4, 7, 8, 15, 37):
        # To the bit, whatever stands beside it.
        assert torch.equal(matrix(whole[:n]), together[:n])


def test_a_whole_settles_in_memory_of_its_own_and_multiplies_as_before() -> None:
    matrix = Matrix(torch.randn(100, 40).bfloat16(), None)
    x = torch.randn(3, 40).bfloat16()
    before = matrix(x)
    matrix.settle_()
    assert torch.equal(matrix(x), before)


def test_tokens_that_lie_apart_are_read_where_they_are_and_others_are_copied() -> None:
    matrix = Matrix(torch.randn(50, 8).bfloat16(), None)
    wide = torch.randn(6, 20).bfloat16()
    apart, across = wide[:, 4:12], torch.randn(8, 6).bfloat16().T
    assert torch.equal(matrix(apart), matrix(apart.contiguous()))
    assert torch.equal(matrix(across), matrix(across.contiguous()))
    assert torch.equal(matrix(wide[:, :8].view(2, 3, 8)), matrix(wide[:, :8]).view(2, 3, 50))
    assert matrix(wide[:0, :8]).shape == (0, 50)
    assert torch.equal(matrix(wide[0, :8]), matrix(wide[:1, :8])[0])


def test_what_is_not_finite_stays_in_its_row() -> None:
    matrix = Matrix(torch.randn(20, 8).bfloat16(), None)
    x = torch.randn(9, 8).bfloat16()
    x[4, 3] = torch.nan
    assert matrix(x).isfinite().all(-1).tolist() == [row != 4 for row in range(9)]


def test_what_cannot_be_read_in_pairs_or_multiplied_is_refused() -> None:
    with pytest.raises(ValueError, match="3 inputs cannot be read in pairs"):
        Matrix(torch.randn(4, 3).bfloat16(), None)
    matrix = Matrix(torch.randn(4, 8).bfloat16(), None)
    with pytest.raises(ValueError, match="does not multiply"):
        matrix(torch.randn(2, 6).bfloat16())
    with pytest.raises(ValueError, match="does not multiply"):
        matrix(torch.randn(2, 8))


def test_it_is_compiled_beforehand_with_the_other_loops() -> None:
    compile_(torch.bfloat16)
    assert "address" in vars(linear.multiply_bfloat16)
    assert "address" in vars(order.order)


Own = tuple[torch.Tensor, torch.Tensor] | None
"""A and B of one row, or nothing."""


def draw(rank: int, n_in: int, n_out: int) -> Own:
    if not rank:
        return None
    return torch.randn(rank, n_in).bfloat16(), (torch.randn(n_out, rank) * 0.3).bfloat16()


def told(by_row: Sequence[Sequence[Own]]) -> tuple[Rows, Numbers, list[LowRank]]:
    """Return what a loop is told of each row's modules, and what has to stay meanwhile."""
    kept: list[LowRank] = []
    places = np.zeros((len(by_row), len(by_row[0]), 3), np.int64)
    for row, modules in enumerate(by_row):
        for module, own in enumerate(modules):
            if own is not None:
                kept += in_order([own])
                places[row, module] = kept[-1].place
    return Rows(places.ctypes.data, 3 * len(by_row[0]), len(by_row)), places, kept


def added(x: torch.Tensor, own: Own, n_out: int) -> torch.Tensor:
    """What a row's own adds to each token, in float64, x Aᵀ rounded as it is."""
    if own is None:
        return x.new_zeros(len(x), n_out, dtype=torch.float64)
    hidden = (x.double() @ own[0].double().T).bfloat16()
    return hidden.double() @ own[1].double().T


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 26])
@pytest.mark.parametrize("n_in", [2, 6, 30, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_each_rows_own_of_any_rank_goes_into_the_sums_of_a_product_of_several_modules(
    n_in: int, n_tokens: int, n_threads: int, has_bias: bool
) -> None:
    torch.set_num_threads(n_threads)
    sizes, firsts = (100, 48, 20), (0, 3 * COLUMNS, 4 * COLUMNS)
    weight = torch.randn(4 * COLUMNS + 20, n_in).bfloat16()
    bias = torch.randn(len(weight)).bfloat16() if has_bias else None
    matrix = Matrix(weight, bias)
    ranks = [(16, 1, 3), (0, 0, 0), (17, 0, 2), (5, 256, 32), (16, 16, 16)]
    by_row = [[draw(r, n_in, n) for r, n in zip(own, sizes, strict=True)] for own in ranks]
    rows, places, kept = told(by_row)
    parts = [part(*each) for each in zip(firsts, sizes, range(3), strict=True)]
    numbers = (3, *(n for each in parts for n in each))
    x = torch.randn(len(ranks), n_tokens, n_in).bfloat16()
    found = matrix(x, (*rows, *numbers))
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for row, modules in enumerate(by_row):
        for first, size, own in zip(firsts, sizes, modules, strict=True):
            exact[row, :, first : first + size] += added(x[row], own, size)
    # What rounds the hidden numbers rounds some of them the other way.
    assert distance(found, exact) < 4e-3
    assert torch.equal(found[1], matrix(x[1]))
    for row in range(len(ranks)):
        # To the bit, whatever stands beside it, in whatever number of tokens.
        alone = Rows(places[row].ctypes.data, rows.by_row, 1)
        assert torch.equal(matrix(x[row : row + 1], (*alone, *numbers))[0], found[row])
        assert torch.equal(matrix(x[row : row + 1, :1], (*alone, *numbers))[0], found[row, :1])
    assert len(kept) == 11


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("n_tokens", "n_out"), [(1, 100), (5, 48), (26, 47)])
def test_each_rows_own_is_added_to_outputs_that_are_there_where_they_lie(
    n_tokens: int, n_out: int, n_threads: int
) -> None:
    torch.set_num_threads(n_threads)
    by_row = [[None, draw(rank, 30, n_out)] for rank in (3, 0, 16)]
    rows, _, kept = told(by_row)
    x = torch.randn(3, n_tokens, 30).bfloat16()
    wide = torch.randn(3, n_tokens, n_out + 10).bfloat16()
    before, y = wide.clone(), wide[..., 4 : 4 + n_out]
    exact = y.double()
    for row, modules in enumerate(by_row):
        exact[row] += added(x[row], modules[1], n_out)
    add_packed_(y, x, rows, 1)
    assert distance(y, exact) < 4e-3
    assert torch.equal(y[1], before[1, :, 4 : 4 + n_out])
    assert torch.equal(wide[..., :4], before[..., :4])
    assert torch.equal(wide[..., 4 + n_out :], before[..., 4 + n_out :])
    assert [each.rank for each in kept] == [3, 16]


def test_what_is_not_finite_in_a_rows_own_stays_in_its_row() -> None:
    matrix = Matrix(torch.randn(60, 8).bfloat16(), None)
    own = draw(3, 8, 60)
    assert own is not None
    own[1][5, 1] = torch.inf
    rows, _, kept = told([[None], [own], [draw(4, 8, 60)]])
    found = matrix(torch.randn(3, 2, 8).bfloat16(), (*rows, 1, *part(0, 60, 0)))
    assert found.isfinite().all(-1).all(-1).tolist() == [True, False, True]
    assert len(kept) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
def test_matrices_of_any_kind_are_brought_into_order_side_by_side(dtype: torch.dtype) -> None:
    sizes = [(5, 8, 60), (16, 70, 48), (33, 34, 7), (1, 2, 1), (16, 34, 100), (51, 48, 97)]
    given = [
        (torch.randn(rank, n_in).to(dtype), torch.randn(n_out, rank).to(dtype))
        for rank, n_in, n_out in sizes
    ]
    given += [(a.T.contiguous().T, b.T.contiguous().T) for a, b in given]
    wide = torch.randn(40, 40).to(dtype)
    given.append((wide[:6, 4:30], wide.T[:9, :6]))
    given.append((wide[:6, ::2], wide[::2, :6]))
    found = in_order(given)
    for (a, b), each in zip(given, found, strict=True):
        rank, n_in = a.shape
        own = each.a.view(-1, n_in // 2, tiles.WIDTH, 2).permute(0, 2, 1, 3).reshape(-1, n_in)
        assert torch.equal(own[:rank], a.bfloat16())
        assert not own[rank:].any()
        blocks = each.b.view(-1, (rank + 1) // 2, COLUMNS, 2)
        own = blocks.permute(0, 2, 1, 3).reshape(-1, rank + rank % 2)
        assert torch.equal(own[: len(b), :rank], b.bfloat16())
        assert not own[len(b) :].any()
        assert not own[:, rank:].any()
        assert each.place == (each.a.data_ptr(), each.b.data_ptr(), rank)
    ends = [each.data_ptr() + each.nbytes for low in found for each in (low.a, low.b)]
    assert [each.data_ptr() for low in found for each in (low.a, low.b)][1:] == ends[:-1]
    assert in_order([]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_each_b_is_multiplied_by_its_scale_before_it_is_rounded(dtype: torch.dtype) -> None:
    scales = [0.3, 1.0, 1e5]
    given = [(torch.randn(16, 6).to(dtype), torch.randn(50, 16).to(dtype)) for _ in scales]
    given[1] = given[1][0], given[1][1].T.contiguous().T
    scaled = [(a, b.float() * scale) for (a, b), scale in zip(given, scales, strict=True)]
    for found, expected in zip(in_order(given, scales), in_order(scaled), strict=True):
        assert torch.equal(found.a, expected.a)
        assert torch.equal(found.b, expected.b)
    with pytest.raises(ValueError, match="shorter"):
        in_order(given, [1.0])


def test_what_cannot_be_added_is_refused() -> None:
    with pytest.raises(ValueError, match="3 inputs cannot be read in pairs"):
        in_order([(torch.randn(2, 3), torch.randn(4, 2))])
    with pytest.raises(ValueError, match="begin at 20, inside of a block"):
        part(20, 48, 0)
    matrix = Matrix(torch.randn(4, 8).bfloat16(), None)
    x = torch.randn(3, 1, 8).bfloat16()
    with pytest.raises(ValueError, match="2 rows and 1 modules do not go with"):
        matrix(x, (0, 0, 2, 1, 0, 1, 0))
    with pytest.raises(ValueError, match="9 modules do not go with"):
        matrix(x, (0, 0, 3, 9))
    for y, given in ((torch.randn(2, 1, 4), x), (torch.randn(3, 1, 4), x), (x, x[:2])):
        with pytest.raises(ValueError, match="do not go with"):
            add_packed_(y, given, Rows(0, 0, 3), 0)
