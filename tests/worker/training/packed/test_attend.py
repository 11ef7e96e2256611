"""Both ways of attention within rows are the formula's, forward and backward, of any length."""

import sys

import pytest
import torch

from worker.kernels import tiles
from worker.training.packed.attend import (
    Attention,
    LoopAttention,
    ProductAttention,
)
from worker.training.packed.layout import Layout
from worker.training.packed.ways import attention_of

NEEDS_LOOPS = pytest.mark.skipif(
    not tiles.is_supported(), reason="this processor has no AVX512-BF16"
)
WAYS = pytest.mark.parametrize(
    ("how", "dtype"),
    [
        (ProductAttention, torch.float32),
        (ProductAttention, torch.bfloat16),
        pytest.param(LoopAttention, torch.bfloat16, marks=NEEDS_LOOPS),
    ],
)
SCALE = 0.3


def test_loops_are_for_bfloat16_where_there_is_the_instruction() -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    assert attention_of(x) is (LoopAttention if tiles.is_supported() else ProductAttention)
    assert attention_of(x.float()) is ProductAttention
    assert LoopAttention.longest == sys.maxsize


def turned(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cosines, sines = (each[:, None].double() for each in turns)
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def exact_attention(
    projected: list[torch.Tensor],
    turns: tuple[torch.Tensor, torch.Tensor] | None,
    lengths: list[int],
) -> torch.Tensor:
    queries, keys, values = projected
    if turns is not None:
        queries, keys = turned(queries, turns), turned(keys, turns)
    n_sharing = queries.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(n_sharing, 1) for each in (keys, values))
    parts = []
    for q, k, v in zip(*(each.split(lengths) for each in (queries, keys, values)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q, k) * SCALE
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hij,jhd->ihd", shares, v))
    return torch.cat(parts)


@WAYS
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("with_turns", [False, True])
@pytest.mark.parametrize(
    ("heads", "width", "lengths"),
    [
        ((4, 4), 8, [7, 6, 7, 3, 1]),
        ((6, 2), 16, [64, 1, 65, 63]),
        ((3, 1), 64, [200, 130]),
        ((2, 1), 6, [33]),
    ],
)
def test_results_and_gradients_are_those_of_the_formula(  # noqa: PLR0913 - what is varied
    how: type[Attention],
    dtype: torch.dtype,
    n_threads: int,
    with_turns: bool,
    heads: tuple[int, int],
    width: int,
    lengths: list[int],
) -> None:
    torch.manual_seed(0)
    n, (n_heads, n_keys) = sum(lengths), heads
    sizes = [n_heads * width, n_keys * width, n_keys * width]
    whole, outer = torch.randn(n, sum(sizes)).to(dtype), torch.randn(n, n_heads, width).to(dtype)
    turns = None
    if with_turns:
        angles = (torch.rand(n, width // 2) * 6).repeat(1, 2)
        turns = angles.cos().to(dtype), angles.sin().to(dtype)

    def by_head(tokens: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (-1, width)) for part in tokens.split(sizes, -1)]

    exact_in = [each.double().requires_grad_() for each in by_head(whole)]
    exact = exact_attention(exact_in, turns, lengths)
    exact_back = torch.autograd.grad(exact, exact_in, outer.double())
    rows = Layout.of(lengths, "one")
    found, back = torch.empty_like(outer), torch.empty_like(whole)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        saved = how.attend(by_head(whole), turns, SCALE, rows, found)
        how.attend_back(outer, saved, turns, SCALE, rows, by_head(back))
    finally:
        torch.set_num_threads(before)
    expected = [exact.detach(), *exact_back]
    for one, other in zip([found, *by_head(back)], expected, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert float(error) < (1e-5 if dtype == torch.float32 else 1.2e-2)


@NEEDS_LOOPS
def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    torch.manual_seed(0)
    lengths = [70, 33, 128]
    whole, outer = torch.randn(sum(lengths), 3, 16).bfloat16(), torch.randn(231, 1, 16).bfloat16()

    def run(own: slice, lengths: list[int]) -> list[torch.Tensor]:
        rows, found = Layout.of(lengths, "one"), torch.empty_like(outer[own])
        projected = [whole[own, index : index + 1].clone() for index in range(3)]
        back = [torch.empty_like(each) for each in projected]
        saved = LoopAttention.attend(projected, None, SCALE, rows, found)
        LoopAttention.attend_back(outer[own], saved, None, SCALE, rows, back)
        return [found, *back]

    together, alone = run(slice(0, 231), lengths), run(slice(70, 103), [33])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[70:103], other)


@NEEDS_LOOPS
def test_what_is_not_finite_shows() -> None:
    projected = [torch.ones(5, 1, 8).bfloat16() for _ in range(3)]
    projected[1][2] = torch.inf
    found = torch.empty(5, 1, 8).bfloat16()
    LoopAttention.attend(projected, None, SCALE, Layout.of([5], "one"), found)
    assert found.isfinite().all(-1).flatten().tolist() == [True, True, False, False, False]


@NEEDS_LOOPS
def test_heads_that_loops_cannot_read_are_refused() -> None:
    rows, found = Layout.of([5], "one"), torch.empty(5, 2, 8).bfloat16()
    for wrong in (torch.ones(5, 2, 8), torch.ones(5, 8, 2).bfloat16().mT):
        with pytest.raises(ValueError, match="are not read"):
            LoopAttention.attend([wrong] * 3, None, SCALE, rows, found)
