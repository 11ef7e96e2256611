"""Products in bfloat16 by tiles: those of float64, for any sizes, a row by itself."""

import pytest
import torch

from worker.kernels import linear, tiles
from worker.kernels.matrix import Matrix
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
