"""Sums of products in bfloat16: those of float64, however their factors lie."""

from itertools import product

import pytest
import torch

from tests.worker.kernels.exact import THREADS, assert_near
from worker.kernels import gemm, tiles
from worker.kernels.products import Term, add_up_, is_supported

pytestmark = pytest.mark.skipif(
    not tiles.is_supported(), reason="this processor has no AVX512-BF16"
)

INNER, COLUMNS = 34, 50


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def by_column(*shape: int) -> torch.Tensor:
    *before, n_rows, n_columns = shape
    return draw(*before, n_columns, n_rows).mT


@THREADS
@pytest.mark.parametrize("n_rows", [1, 2, 7, 8, 15, 33, 100])
@pytest.mark.parametrize("n_columns", [1, 15, 16, 17, 32, 40, 48, 49, 130])
def test_factors_of_any_size_and_either_order_are_multiplied(
    n_rows: int, n_columns: int, n_threads: int
) -> None:
    torch.set_num_threads(n_threads)
    for x, w in product(
        (draw(n_rows, INNER), by_column(n_rows, INNER)),
        (draw(INNER, n_columns), by_column(INNER, n_columns)),
    ):
        exact = x.double() @ w.double()
        for dtype in (torch.bfloat16, torch.float32):
            out = torch.full((n_rows, n_columns), torch.nan, dtype=dtype)
            add_up_([Term(x, w)], out)
            assert_near(out, exact)
            turned = torch.full((n_columns, n_rows), torch.nan, dtype=dtype)
            add_up_([Term(x, w)], turned.t())
            assert torch.equal(turned.t(), out)


def test_more_rows_and_numbers_than_are_in_a_cache_at_a_time_are_summed() -> None:
    n_rows, n_inner = gemm.ROWS + 70, 2 * gemm.PAIRS + 150
    x, w = draw(n_rows, n_inner), draw(20, n_inner)
    out = torch.empty(n_rows, 20, dtype=torch.float32)
    add_up_([Term(x, w.t())], out)
    assert_near(out, x.double() @ w.double().t())
    gradients = torch.empty(20, n_inner, dtype=torch.float32)
    add_up_([Term(out.bfloat16().t(), x)], gradients)
    assert_near(gradients, out.bfloat16().double().t() @ x.double())


@pytest.mark.parametrize("n", [1, 3, 33, 65, 2 * gemm.PAIRS + 1])
def test_an_odd_number_of_products_is_summed_and_nothing_beside_it(n: int) -> None:
    x, w = draw(70, n), draw(n, 50)
    not_there = torch.full((70, 1), torch.nan, dtype=torch.bfloat16)
    lefts = torch.cat((x, not_there), 1)[:, :n], torch.cat((x.t(), not_there.t()))[:n].t()
    rights = (
        torch.cat((w, not_there[:50].t()))[:n],
        torch.cat((w.t(), not_there[:50]), 1)[:, :n].t(),
    )
    for left, right in product(lefts, rights):
        out = torch.empty(70, 50, dtype=torch.float32)
        add_up_([Term(left, right)], out)
        assert_near(out, x.double() @ w.double())


@THREADS
def test_terms_add_to_their_own_rows_and_a_bias_to_all(n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    x, w, bias = draw(90, INNER), by_column(INNER, COLUMNS), draw(COLUMNS)
    first, second = (draw(40, 8), by_column(8, COLUMNS)), (draw(21, 4), draw(4, COLUMNS))
    out = torch.empty(90, COLUMNS, dtype=torch.bfloat16)
    add_up_([Term(x, w), Term(*first), Term(*second, 69)], out, bias=bias)
    exact = x.double() @ w.double() + bias.double()
    exact[:40] += first[0].double() @ first[1].double()
    exact[69:] += second[0].double() @ second[1].double()
    assert_near(out, exact)


def test_what_is_to_be_rounded_first_is_and_else_nothing_is_lost() -> None:
    n = 512
    x, w = torch.ones(n, 2).bfloat16(), torch.full((2, 4), 0.5).bfloat16()
    small = torch.full((n, 2), 2.0**-6).bfloat16(), torch.full((2, 4), 2.0**-6).bfloat16()
    out = torch.empty(n, 4, dtype=torch.float32)
    add_up_([Term(x, w), Term(*small), Term(*small)], out)
    assert torch.equal(out, torch.full((n, 4), 1 + 2.0**-10))
    # A number that small is lost beside 1 in bfloat16, and together two of them are not here.
    out = torch.empty(n, 4, dtype=torch.float32)
    add_up_([Term(x, w), Term(*small), Term(*small)], out, n_rounded=2)
    assert torch.equal(out, torch.full((n, 4), 1 + 2.0**-11))


def test_parts_of_wider_matrices_are_read_and_written_where_they_are() -> None:
    wide, weights = draw(30, 100), draw(60, 90)
    x, w = wide[:, 20:54], weights[10:44, 30:80]
    place = torch.zeros(30, 80, dtype=torch.bfloat16)
    add_up_([Term(x, w)], place[:, 10:60])
    assert_near(place[:, 10:60], x.double() @ w.double())
    assert not place[:, :10].any()
    assert not place[:, 60:].any()


def test_nothing_times_something_is_nothing() -> None:
    place = torch.ones(4, 8, dtype=torch.bfloat16)
    add_up_([Term(draw(0, INNER), draw(INNER, 8))], place[2:2])
    assert place.eq(1).all()
    add_up_([Term(draw(4, 0), draw(0, 8))], place)
    assert not place.any()


def test_what_is_not_finite_stays_in_its_row() -> None:
    x = draw(40, INNER)
    x[17, 3] = torch.nan
    out = torch.empty(40, COLUMNS, dtype=torch.bfloat16)
    add_up_([Term(x, draw(INNER, COLUMNS))], out)
    assert out.isfinite().all(-1).tolist() == [row != 17 for row in range(40)]


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    out = torch.zeros(6, 8, dtype=torch.bfloat16)
    refused: list[tuple[str, list[Term], torch.Tensor | None]] = [
        ("does not fit into", [Term(draw(6, 4), draw(6, 8))], None),
        ("does not fit into", [Term(draw(6, 4), draw(4, 7))], None),
        ("from row 3 on", [Term(draw(4, 4), draw(4, 8), 3)], None),
        ("are of bfloat16", [Term(draw(6, 4).float(), draw(4, 8))], None),
        ("Neither rows nor columns", [Term(draw(6, 8)[:, ::2], draw(4, 8))], None),
        ("is not added to columns", [Term(draw(6, 4), draw(4, 8))], draw(7)),
    ]
    for match, terms, bias in refused:
        with pytest.raises(ValueError, match=match):
            add_up_(terms, out, bias=bias)
    with pytest.raises(ValueError, match="not written in"):
        add_up_([Term(draw(6, 4), draw(4, 8))], out.double())
    assert not out.any()


def test_other_kinds_of_numbers_are_left_to_others() -> None:
    assert is_supported(draw(1))
    assert not is_supported(torch.ones(1))
    assert not is_supported(torch.ones(1, dtype=torch.bfloat16, device="meta"))
