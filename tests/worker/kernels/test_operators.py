"""The compiled loops compute what PyTorch does in float64, for any sizes, within their dtype."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.worker.kernels.exact import DTYPES, THREADS, assert_near
from worker.kernels import Numbers
from worker.kernels.operators import (
    add_and_rescale,
    add_low_rank_,
    attend,
    compile_,
    gated,
    is_supported,
    largest,
    rescale,
    rotated,
    store_,
)


def test_the_dtypes_of_bases_on_a_cpu_are_supported_and_others_are_not() -> None:
    assert is_supported(torch.bfloat16)
    assert is_supported(torch.float32)
    assert not is_supported(torch.float16)
    compile_(torch.float32)


class Matrices:
    """Of some rows' adapters, by rank; rank 0 is none."""

    def __init__(self, ranks: list[int], sizes: tuple[int, int], dtype: torch.dtype) -> None:
        n_in, n_out = sizes
        self.a = [torch.randn(rank, n_in).to(dtype) for rank in ranks]
        self.b = [torch.randn(rank, n_out).to(dtype) for rank in ranks]

    def places(self, n_modules: int, module: int) -> Numbers:
        places = np.zeros((len(self.a), n_modules, 3), np.int64)
        for row, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            if len(a):
                places[row, module] = a.data_ptr(), b.data_ptr(), len(a)
        return places

    def added(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.a, self.b, strict=True)
        return torch.stack(
            [
                y[row].double() + x[row].double() @ a.double().T @ b.double()
                for row, (a, b) in enumerate(pairs)
            ]
        )


@DTYPES
@THREADS
@pytest.mark.parametrize("n_tokens", [1, 2, 15, 16, 17, 50])
@pytest.mark.parametrize("ranks", [[4, 0, 16, 1], [3], [70, 6]], ids=str)
def test_each_row_gets_what_its_own_matrices_make_of_it(
    ranks: list[int], n_tokens: int, n_threads: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(n_threads)
    matrices = Matrices(ranks, (33, 70), dtype)
    x = torch.randn(len(ranks), n_tokens, 33).to(dtype)
    y = torch.randn(len(ranks), n_tokens, 70).to(dtype)
    exact = matrices.added(y, x)
    add_low_rank_([(y, 2)], x, matrices.places(5, 2), dtype)
    assert_near(y, exact)


def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it() -> None:
    matrices = Matrices([8, 4, 16, 8, 2], (64, 96), torch.bfloat16)
    x, y = (torch.randn(5, 1, size).bfloat16() for size in (64, 96))
    alone = y.clone()
    places = matrices.places(1, 0)
    add_low_rank_([(y, 0)], x, places, torch.bfloat16)
    for row in range(5):
        own = slice(row, row + 1)
        add_low_rank_([(alone[own], 0)], x[own], places[own].copy(), torch.bfloat16)
    assert torch.equal(y, alone)


def test_what_overflows_stays_in_its_row_and_a_row_without_an_adapter_is_left_alone() -> None:
    matrices = Matrices([2, 0, 2], (8, 8), torch.bfloat16)
    matrices.a[0].fill_(float("nan"))
    matrices.b[2].fill_(float("inf"))
    x, y = torch.ones(3, 1, 8).bfloat16(), torch.ones(3, 1, 8).bfloat16()
    add_low_rank_([(y, 0)], x, matrices.places(1, 0), x.dtype)
    assert y[0].isnan().all()
    assert torch.equal(y[1], torch.ones(1, 8).bfloat16())
    assert not y[2].isfinite().any()


def test_rows_that_lie_apart_in_memory_are_read_where_they_are() -> None:
    matrices = Matrices([4, 4], (16, 24), torch.float32)
    x = torch.randn(3, 2, 16).transpose(0, 1)
    y = torch.randn(2, 3, 24)
    exact = matrices.added(y, x)
    add_low_rank_([(y, 0)], x, matrices.places(1, 0), x.dtype)
    assert_near(y, exact)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(2, 1, 4), torch.zeros(3, 1, 4)),
        (torch.zeros(6, 4), torch.zeros(6, 4)),
        (torch.zeros(3, 1, 4), torch.zeros(3, 1, 4).bfloat16()),
        (torch.zeros(3, 2, 4), torch.zeros(3, 1, 4)),
        (torch.zeros(3, 1, 4).bfloat16(), torch.zeros(3, 1, 4).bfloat16()),
    ],
    ids=["fewer rows", "tokens for rows", "another output", "fewer tokens", "other matrices"],
)
def test_tensors_that_do_not_go_together_are_refused(x: torch.Tensor, y: torch.Tensor) -> None:
    matrices = Matrices([1, 1, 1], (4, 4), torch.float32)
    with pytest.raises(ValueError, match="do not go with"):
        add_low_rank_([(y, 0)], x, matrices.places(1, 0), torch.float32)


@DTYPES
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_parts_of_one_tensor_are_added_to_side_by_side(n_tokens: int, dtype: torch.dtype) -> None:
    sizes = (24, 8, 16)
    whole = torch.randn(2, n_tokens, sum(sizes)).to(dtype)
    x = torch.randn(2, n_tokens, 12).to(dtype)
    several = [Matrices([4, 0], (12, sizes[0]), dtype), Matrices([3, 5], (12, sizes[2]), dtype)]
    parts = whole.split(sizes, -1)
    exact = whole.double()
    exact[..., :24] = several[0].added(parts[0], x)
    exact[..., 32:] = several[1].added(parts[2], x)
    places = several[0].places(4, 3) + several[1].places(4, 1)
    add_low_rank_([(parts[0], 3), (parts[1], 0), (parts[2], 1)], x, places, dtype)
    assert_near(whole, exact)


def test_tokens_at_unequal_distances_are_refused() -> None:
    matrices = Matrices([1, 1, 1], (4, 4), torch.float32)
    y = torch.zeros(2, 3, 4).transpose(0, 1)
    with pytest.raises(ValueError, match="equal distances"):
        add_low_rank_([(y, 0)], torch.zeros(3, 2, 4), matrices.places(1, 0), torch.float32)


@DTYPES
@THREADS
@pytest.mark.parametrize("n_tokens", [1, 2, 31])
def test_a_norm_is_llamas_own(n_tokens: int, n_threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(n_threads)
    norm: Any = LlamaRMSNorm(50, eps=1e-5).requires_grad_(False)
    norm.weight.normal_()
    norm.to(dtype)
    x = torch.randn(2, n_tokens, 50).to(dtype) * 7
    found = rescale(x, norm.weight, 1e-5)
    assert found.shape == x.shape
    if dtype == torch.bfloat16:
        assert torch.equal(found, norm(x))
    torch.testing.assert_close(found, norm(x))


@DTYPES
@THREADS
def test_a_sum_and_its_norm_are_those_of_torch(n_threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(n_threads)
    norm: Any = LlamaRMSNorm(40, eps=1e-6).requires_grad_(False).to(dtype)
    x, z = torch.randn(2, 3, 5, 40).to(dtype)
    total, found = add_and_rescale(x, z, norm.weight, 1e-6)
    assert torch.equal(total, x + z)
    torch.testing.assert_close(found, norm(total))


@DTYPES
@THREADS
def test_gates_are_those_of_float64_far_out_too(n_threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(n_threads)
    both = (torch.randn(3, 5, 48) * 30).to(dtype)
    both[0, 0, :3] = torch.tensor([-1e4, 0.0, 1e4])
    gate, value = both.chunk(2, -1)
    found = gated(gate, value)
    assert found.is_contiguous()
    assert_near(found, torch.nn.functional.silu(gate.double()) * value.double())
    both[1, 1, 0] = float("nan")
    assert torch.nonzero(gated(gate, value).isnan()).tolist() == [[1, 1, 0]]


@DTYPES
@THREADS
@pytest.mark.parametrize("n_positions", [1, 3], ids=["one for all rows", "each row its own"])
@pytest.mark.parametrize("joint", [False, True])
def test_positions_are_put_in_as_llama_does(
    n_positions: int, n_threads: int, dtype: torch.dtype, *, joint: bool
) -> None:
    torch.set_num_threads(n_threads)
    heads, d, n_tokens = (4, 2, 2), 6, 5
    whole = torch.randn(3, n_tokens, sum(heads) * d).to(dtype)
    parts = whole.split([n * d for n in heads], -1)
    angles = torch.rand(n_positions, n_tokens, d // 2).repeat(1, 1, 2) * 6
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    found = rotated(parts if joint else [each.contiguous() for each in parts], *turns)
    apart = [each.unflatten(-1, (-1, d)).transpose(1, 2).double() for each in parts]
    turned = apply_rotary_pos_emb(apart[0], apart[1], *(each.double() for each in turns))
    for mine, exact in zip(found[:2], turned, strict=True):
        assert mine.is_contiguous()
        assert_near(mine, exact)
    assert torch.equal(found[2].double(), apart[2])


def test_a_norm_of_a_row_that_is_not_finite_is_not_finite() -> None:
    x = torch.ones(3, 1, 8).bfloat16()
    x[1, 0, 3] = float("nan")
    found = rescale(x, torch.ones(8).bfloat16(), 1e-5)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@DTYPES
@THREADS
@pytest.mark.parametrize(("n_heads", "n_shared"), [(4, 4), (9, 3), (8, 1)])
def test_each_row_attends_to_its_own_tokens(
    n_heads: int, n_shared: int, n_threads: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(n_threads)
    lengths, d, width = np.array([1, 40, 7, 64]), 16, 64
    kept = [torch.randn(5, n_shared, 2 * width, d).to(dtype) for _ in range(2)]
    keys, values = (each[1:5, :, :width] for each in kept)
    for row, length in enumerate(lengths):  # past its end a row holds what was there before
        keys[row, :, length:] = values[row, :, length:] = float("nan")
    query = torch.randn(4, n_heads, 1, d).to(dtype)
    found = attend(query, keys, values, lengths, 0.3)
    assert found.shape == (4, 1, n_heads, d)
    for row, length in enumerate(lengths):
        own_keys, own_values = (
            each[row, :, :length].double().repeat_interleave(n_heads // n_shared, 0)
            for each in (keys, values)
        )
        asked = query[row].double()
        exact = scaled_dot_product_attention(asked, own_keys, own_values, scale=0.3)
        assert_near(found[row, 0], exact[:, 0])


def test_scores_far_apart_are_as_sure_as_they_are() -> None:
    keys = torch.tensor([-1e4, 0.0, 1e4]).view(1, 1, 3, 1)
    values = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    found = attend(torch.ones(1, 1, 1, 1), keys, values, np.array([3]), 1.0)
    assert found.item() == 3.0


@DTYPES
def test_a_token_is_stored_as_the_last_of_its_row_and_nothing_else_changes(
    dtype: torch.dtype,
) -> None:
    buffers = [torch.randn(3, 2, 10, 4).to(dtype) for _ in range(2)]
    expected = [each.clone() for each in buffers]
    keys, values = (each[1:, :, :8] for each in buffers)
    tokens = [torch.randn(2, 1, 2, 4).to(dtype).transpose(1, 2) for _ in range(2)]
    store_((keys, values), (tokens[0], tokens[1]), np.array([3, 8]))
    for before, token in zip(expected, tokens, strict=True):
        before[1, :, 2], before[2, :, 7] = token[0, :, 0], token[1, :, 0]
    assert torch.equal(buffers[0], expected[0])
    assert torch.equal(buffers[1], expected[1])


@DTYPES
@THREADS
@pytest.mark.parametrize("d", [1, 5, 1024, 5000])
def test_the_largest_of_each_row_is_found_where_it_first_is(
    d: int, n_threads: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(n_threads)
    x = torch.randn(7, d).to(dtype)  # in bfloat16 several are equal
    x[1] = -3.0
    x[2, d // 2] = float("inf")
    x[3] = float("-inf")
    values, places = largest(x)
    found = x.max(-1)
    assert values == found.values.tolist()
    assert places == [int((row == row.max()).nonzero()[0]) for row in x]


@DTYPES
@pytest.mark.parametrize("at", [0, 1023, 1024, 4999])
def test_one_nan_makes_the_largest_of_its_row_nan(at: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5000).to(dtype)
    x[1, at] = float("nan")
    x[1, 2500] = float("inf")
    values, places = largest(x)
    assert np.isnan(values).tolist() == [False, True, False]
    assert all(0 <= place < 5000 for place in places)
