"""What the kernels compute is what autograd makes of the formulas in float64.

Without a GPU Triton's interpreter runs them, which cuts bfloat16 off instead of rounding it.
"""

import pytest
import torch
from torch.nn import functional

from worker.gpu import operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 1e-5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
WIDTHS = pytest.mark.parametrize("d", [1, 37, 64, 1300])
# Of one rounding, and of a rounding that is divided away again.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def put(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(DEVICE, dtype)


def assert_near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.double().cpu() - exact).norm() / exact.norm()
    assert float(error) < LIMITS[dtype]


def normal(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def test_a_small_kernel_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    own, made = operators.gated, []

    def spy(*given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        made.append(own(*given, out=out).tolist())
        return out

    monkeypatch.setattr(operators, "gated", spy)
    operators.try_out(DEVICE)
    assert made[0][0] == pytest.approx([0.7310586] * 16)
    monkeypatch.setattr(operators, "gated", lambda *_, out: out.fill_(3.0))
    with pytest.raises(RuntimeError, match="instead of"):
        operators.try_out(DEVICE)


@DTYPES
@WIDTHS
@pytest.mark.parametrize("adds", [False, True])
def test_a_norm_of_tokens_or_of_their_sum(dtype: torch.dtype, d: int, adds: bool) -> None:
    x, z, weight = (put(each, dtype) for each in (draw(5, d), draw(5, d, seed=1), draw(d).abs()))
    factors, out = torch.empty(5, device=DEVICE), torch.empty_like(x)
    if adds:
        total = torch.empty_like(x)
        places = (total, out)
        found = operators.add_and_rescale(x, z, weight, EPSILON, out=places, factors=factors)
        assert found is places
        assert_near(total, x.double().cpu() + z.double().cpu(), dtype)
        x = total
    else:
        assert operators.rescale(x, weight, EPSILON, out=out, factors=factors) is out
    exact = x.double().cpu()
    assert_near(out, normal(exact) * weight.double().cpu(), dtype)
    assert_near(factors, 1 / (exact.square().mean(-1) + EPSILON).sqrt(), torch.float32)


@DTYPES
@WIDTHS
@pytest.mark.parametrize("is_bare", [False, True])
@pytest.mark.parametrize("has_other", [False, True])
def test_the_gradient_of_a_norm(dtype: torch.dtype, d: int, is_bare: bool, has_other: bool) -> None:
    x, gradient, other = (put(draw(3, d, seed=seed), dtype) for seed in range(3))
    weight = put(draw(d).abs() + 0.5, dtype)
    out, y, factors = torch.empty_like(x), torch.empty_like(x), torch.empty(3, device=DEVICE)
    operators.rescale(x, weight, EPSILON, out=y, factors=factors)
    twin = x.double().cpu().requires_grad_()
    scaled = normal(twin) * weight.double().cpu()
    (exact,) = torch.autograd.grad(scaled, twin, gradient.double().cpu())
    scale = exact.norm()
    if is_bare:
        y = put(normal(x.double()), dtype)
    given = other if has_other else None
    found = operators.rescale_back(gradient, y, weight, factors, given, out=out, is_bare=is_bare)
    assert found is out
    if has_other:
        exact = exact + other.double().cpu()
    # Of one number, which is scaled away, almost nothing is left.
    error = (found.double().cpu() - exact).norm() / max(float(scale), 1.0)
    assert float(error) < 3 * LIMITS[dtype]


@DTYPES
@WIDTHS
def test_a_gate_and_its_gradient(dtype: torch.dtype, d: int) -> None:
    both, gradient = put(3 * draw(4, 2 * d), dtype), put(draw(4, d), dtype)
    twin = both.double().cpu().requires_grad_()
    gate, value = twin.chunk(2, -1)
    exact = functional.silu(gate) * value
    (to_both,) = torch.autograd.grad(exact, twin, gradient.double().cpu())
    out = torch.empty_like(gradient)
    found = operators.gated(*both.chunk(2, -1), out=out)
    assert found is out
    assert_near(found, exact.detach(), dtype)
    places = (torch.empty_like(both), torch.empty_like(gradient))
    operators.gated_back(gradient, both, out=places)
    assert_near(places[0], to_both, dtype)
    assert torch.equal(places[1], found)


def test_a_gate_that_is_shut_lets_nothing_through() -> None:
    gate = torch.tensor([[-1e4, -200.0, 0.0, 200.0]], device=DEVICE)
    both = torch.cat((gate, torch.ones_like(gate)), -1)
    found = operators.gated(*both.chunk(2, -1), out=torch.empty_like(gate))
    assert found[0].tolist() == [0.0, 0.0, 0.0, 200.0]
    places = (torch.empty_like(both), torch.empty_like(gate))
    operators.gated_back(torch.ones_like(gate), both, out=places)
    assert places[0][0].tolist() == [0.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 200.0]


@DTYPES
@pytest.mark.parametrize(("n_heads", "width"), [(1, 2), (3, 16), (4, 24)])
@pytest.mark.parametrize("in_place", [False, True])
def test_positions_in_heads_and_their_transpose(
    dtype: torch.dtype, n_heads: int, width: int, in_place: bool
) -> None:
    whole = put(draw(5, 2 + n_heads * width), dtype)
    tokens = whole[:, 2:].unflatten(1, (n_heads, width))
    before = tokens.double().cpu()
    angles = draw(5, width, seed=9)
    turns = put(angles.cos(), dtype), put(angles.sin(), dtype)
    cosines, sines = (each[:, None].double().cpu() for each in turns)
    twin = before.clone().requires_grad_()
    first, second = twin.chunk(2, -1)
    exact = twin * cosines + torch.cat((-second, first), -1) * sines
    gradient = put(draw(5, n_heads, width, seed=4), dtype)
    (back,) = torch.autograd.grad(exact, twin, gradient.double().cpu())
    out = tokens if in_place else torch.empty_like(gradient)
    operators.turn(tokens, turns, out=out)
    assert_near(out, exact.detach(), dtype)
    assert in_place or torch.equal(tokens.double().cpu(), before)
    place = gradient if in_place else torch.empty_like(gradient)
    operators.turn(gradient, turns, out=place, back=True)
    assert_near(place, back, dtype)


@DTYPES
@pytest.mark.parametrize("d", [2, 97, 1000])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_losses_hits_and_the_gradient_of_logits(
    dtype: torch.dtype, d: int, wants_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "LOGITS_BLOCK", 64)
    logits = put(5 * draw(6, d), dtype)
    logits[4] = 0.0  # of equal ones the first is the answer
    labels = torch.arange(6) % d
    labels[1] = int(logits[1].argmax())
    labels[4] = d - 1
    exact = logits.double().cpu().requires_grad_()
    losses = functional.cross_entropy(exact, labels, reduction="none")
    (to_logits,) = torch.autograd.grad(losses.sum(), exact)
    before = logits.clone()
    found, hits = operators.cross_entropy_(logits, labels.to(DEVICE), wants_gradient=wants_gradient)
    torch.testing.assert_close(found.double().cpu(), losses.detach(), rtol=1e-5, atol=1e-5)
    assert hits.tolist() == (before.float().cpu().argmax(-1) == labels).tolist()
    assert not hits[4]
    assert hits[1]
    if wants_gradient:
        assert_near(logits, to_logits, dtype)
    else:
        assert torch.equal(logits, before)


def test_losses_do_not_underflow() -> None:
    logits = torch.tensor([[0.0, 300.0], [-300.0, 0.0]], device=DEVICE)
    labels = torch.tensor([0, 0], device=DEVICE)
    losses, _ = operators.cross_entropy_(logits, labels, wants_gradient=False)
    assert losses.tolist() == [300.0, 300.0]


@pytest.mark.parametrize("label", [-1, 2, 10**9])
def test_a_label_that_names_no_logit_has_no_loss(label: int) -> None:
    logits = torch.zeros(2, 2, device=DEVICE)
    labels = torch.tensor([label, 1], device=DEVICE)
    losses, hits = operators.cross_entropy_(logits, labels, wants_gradient=False)
    assert losses[0].isnan()
    assert float(losses[1]) == pytest.approx(0.6931472)
    assert hits.tolist() == [False, False]
