"""What training's loops compute is what autograd makes of the formulas in float64."""

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.worker.kernels.exact import DTYPES, THREADS, assert_near
from worker.kernels import gradients, heads
from worker.kernels.operators import add_and_rescale, gated, rescale
from worker.kernels.team import Loop
from worker.kernels.training import (
    Rows,
    Turns,
    causal_softmax_,
    causal_softmax_back_,
    compile_,
    cross_entropy_,
    gated_back,
    join_heads,
    rescale_back,
    split_heads,
)

EPSILON = 1e-5


def normal(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def test_all_loops_can_be_compiled_beforehand() -> None:
    compile_(torch.float32)
    compile_(torch.bfloat16)
    found = (*vars(gradients).values(), *vars(heads).values())
    loops = [each for each in found if isinstance(each, Loop)]
    assert len(loops) == 14
    assert all("address" in vars(loop) for loop in loops)


@DTYPES
@THREADS
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("is_bare", [False, True])
@pytest.mark.parametrize("has_other", [False, True])
def test_the_gradient_of_a_norm(
    n_tokens: int, n_threads: int, is_bare: bool, has_other: bool, dtype: torch.dtype
) -> None:
    torch.set_num_threads(n_threads)
    x, gradient, other = (torch.randn(n_tokens, 37).to(dtype) for _ in range(3))
    weight = (torch.rand(37) + 0.5).to(dtype)
    factors = torch.empty(n_tokens)
    y = rescale(x, weight, EPSILON, factors=factors)
    assert_near(factors, 1 / (x.double().square().mean(-1) + EPSILON).sqrt())
    exact_x = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(normal(exact_x) * weight.double(), exact_x, gradient.double())
    kept = normal(x.double()).to(dtype) if is_bare else y
    given = other if has_other else None
    out = torch.empty_like(x)
    found = rescale_back(gradient, kept, weight, factors, given, out=out, is_bare=is_bare)
    assert found is out
    error = (found.double() - exact - (other.double() if has_other else 0)).norm() / exact.norm()
    # y / w is off by the rounding of y.
    assert float(error) < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def test_a_sum_and_its_norm_are_put_where_they_are_wanted() -> None:
    x, z = torch.randn(3, 8), torch.randn(3, 8)
    weight, factors = torch.rand(8), torch.empty(3)
    places = torch.empty(3, 8), torch.empty(3, 8)
    total, y = add_and_rescale(x, z, weight, EPSILON, out=places, factors=factors)
    assert total is places[0]
    assert y is places[1]
    assert torch.equal(total, x + z)
    assert_near(y, normal((x + z).double()) * weight.double())
    assert_near(factors, 1 / ((x + z).double().square().mean(-1) + EPSILON).sqrt())


@DTYPES
@THREADS
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_the_gradient_of_a_gate_and_the_gate_once_more(
    n_tokens: int, n_threads: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(n_threads)
    both = (torch.randn(n_tokens, 2 * 35) * 3).to(dtype)
    gradient = torch.randn(n_tokens, 35).to(dtype)
    twin = both.double().requires_grad_()
    first, value = twin.chunk(2, -1)
    exact = functional.silu(first) * value
    (to_both,) = torch.autograd.grad(exact, twin, gradient.double())
    out = torch.empty_like(both), torch.empty_like(gradient)
    gated_back(gradient, both, out=out)
    assert_near(out[0], to_both)
    assert_near(out[1], exact.detach())
    assert_near(gated(*both.chunk(2, -1)), exact.detach())


@DTYPES
@THREADS
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_cross_entropy_its_gradient_and_its_hits(
    n_threads: int, wants_gradient: bool, dtype: torch.dtype
) -> None:
    torch.set_num_threads(n_threads)
    logits = (torch.randn(6, 1100) * 4).to(dtype)
    labels = torch.randint(1100, (6,))
    labels[2] = logits[2].argmax()
    twin = logits.double().requires_grad_()
    exact = functional.cross_entropy(twin, labels, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), twin)
    before = logits.clone()
    losses, hits = cross_entropy_(logits, labels, wants_gradient=wants_gradient)
    torch.testing.assert_close(losses.double(), exact.detach(), rtol=2e-6, atol=2e-6)
    assert hits.dtype == torch.bool
    assert torch.equal(hits, before.argmax(-1) == labels)
    if wants_gradient:
        assert_near(logits, gradient)
    else:
        assert torch.equal(logits, before)


def test_of_equal_logits_only_the_first_is_a_hit() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0]] * 2)
    _, hits = cross_entropy_(logits, torch.tensor([1, 2]), wants_gradient=False)
    assert hits.tolist() == [True, False]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_logits_number_is_refused_before_memory_is_touched(label: int) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(IndexError, match=r"labels .* 3 logits"):
        cross_entropy_(logits, torch.tensor([0, label]), wants_gradient=True)
    assert torch.equal(logits, torch.zeros(2, 3))


def test_heads_whose_numbers_lie_apart_are_refused() -> None:
    tokens, rows = torch.zeros(4, 6, 2).transpose(1, 2), Rows([(0, 4)])
    with pytest.raises(ValueError, match="do not follow each other"):
        split_heads(tokens, rows, None, 1.0, out=torch.zeros(1, 2, 4, 6))


@DTYPES
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_loss_and_in_the_gradient(
    odd: float, dtype: torch.dtype
) -> None:
    logits = torch.randn(2, 40).to(dtype)
    logits[1, 7] = odd
    losses, _ = cross_entropy_(logits, torch.tensor([3, 3]), wants_gradient=True)
    assert losses.isfinite().tolist() == [True, False]
    assert logits[0].isfinite().all()
    assert not logits[1].isfinite().any()
    scores = torch.randn(1, 5, 5).to(dtype)
    scores[0, 3, 2] = odd
    assert causal_softmax_(scores)[0].isfinite().all(-1).tolist() == [True] * 3 + [False, True]


def turns_of(n_tokens: int, dtype: torch.dtype) -> Turns:
    angles = torch.rand(n_tokens, 4) * 6
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@DTYPES
@THREADS
@pytest.mark.parametrize("has_turns", [False, True])
@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens first", "heads first"])
def test_heads_of_rows_are_taken_apart_with_their_positions_and_put_together_without(
    n_threads: int, has_turns: bool, heads_first: bool, dtype: torch.dtype
) -> None:
    torch.set_num_threads(n_threads)
    rows = Rows([(2, 6), (6, 9), (9, 10)])
    assert (len(rows), rows.n) == (3, 4)
    whole = torch.randn(3, 11, 8).transpose(0, 1) if heads_first else torch.randn(11, 40)
    tokens = whole.to(dtype)
    if not heads_first:
        tokens = tokens[:, 16:].unflatten(1, (3, 8))  # some columns of others stand before
    turns = turns_of(11, dtype) if has_turns else None
    twin = tokens.double().requires_grad_()
    turned = twin
    if turns is not None:
        cosines, sines = (each.double()[None] for each in turns)
        turned, _ = apply_rotary_pos_emb(
            twin.transpose(0, 1)[None], twin.transpose(0, 1)[None], cosines, sines
        )
        turned = turned[0].transpose(0, 1)
    exact = torch.zeros(3, 3, 4, 8, dtype=torch.float64)
    for row, (start, end) in enumerate([(2, 6), (6, 9), (9, 10)]):
        exact[row, :, : end - start] = turned[start:end].transpose(0, 1) * 0.3
    split = split_heads(tokens, rows, turns, 0.3, out=torch.full((3, 3, 4, 8), 7.0).to(dtype))
    assert_near(split, exact.detach())
    gradient = torch.randn(3, 3, 4, 8).to(dtype)
    (to_tokens,) = torch.autograd.grad(exact, twin, gradient.double())
    found = torch.zeros_like(tokens)
    join_heads(gradient, rows, turns, 0.3, out=found)
    assert_near(found, to_tokens)
    assert found[:2].count_nonzero() == found[10:].count_nonzero() == 0


@DTYPES
@THREADS
def test_causal_probabilities_and_their_gradient(n_threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(n_threads)
    scores = (torch.randn(3, 2 * 70, 70) * 3).to(dtype)
    twin = scores.double().requires_grad_()
    mask = torch.ones(70, 70, dtype=torch.bool).tril().repeat(2, 1)
    exact = twin.masked_fill(~mask, -torch.inf).softmax(-1)
    shares = causal_softmax_(scores)
    assert shares is scores
    assert_near(shares, exact.detach())
    assert shares[:, ~mask].count_nonzero() == 0
    gradient = torch.randn(scores.shape).to(dtype)
    rounded = shares.double()
    inner = (gradient.double() * rounded).sum(-1, keepdim=True)
    found = causal_softmax_back_(gradient.clone(), shares)
    assert_near(found, (gradient.double() - inner) * rounded)
