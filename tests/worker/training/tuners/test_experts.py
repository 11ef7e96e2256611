"""AdaMix: uniform, independent draws, means, and the divergence that holds passes together."""

import math

import pytest
import torch
from torch import nn

from worker.training.tuners.experts import Experts, divergence, means_of_experts


def experts(n: int = 4, *, bias: bool = True) -> Experts:
    torch.manual_seed(0)
    return Experts([nn.Linear(6, 5, bias=bias) for _ in range(n)])


def test_every_expert_is_drawn_a_quarter_of_the_time_and_layers_are_independent() -> None:
    one, other = experts().train(), experts().train()
    for each in (one, other):  # an expert's number is what it gives
        each.weights.data.zero_()
        assert each.biases is not None
        each.biases.data = torch.arange(4.0)[:, None].expand(4, 5).clone()
    x = torch.zeros(1, 6)
    with torch.no_grad():
        rows = [[float(one(x)[0, 0]), float(other(x)[0, 0])] for _ in range(4000)]
    drawn = torch.tensor(rows)
    for column in drawn.T:
        shares = torch.bincount(column.long(), minlength=4) / len(column)
        assert bool(((shares - 0.25).abs() < 0.03).all())
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.05


def test_an_evaluation_goes_through_the_mean_and_repeats_itself() -> None:
    layer, x = experts().eval(), torch.randn(3, 6)
    assert layer.biases is not None
    expected = nn.functional.linear(x, layer.weights.mean(0), layer.biases.mean(0))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), layer(x))


def test_what_is_stored_is_the_mean_of_weights_and_biases() -> None:
    layer = experts()
    trained = {f"a.own_down.{name}": p.detach() for name, p in layer.named_parameters()}
    stored = means_of_experts({**trained, "a.own_up.weight": torch.ones(2, 3)})
    assert sorted(stored) == ["a.own_down.bias", "a.own_down.weight", "a.own_up.weight"]
    assert layer.biases is not None
    for name, each in (("weight", layer.weights), ("bias", layer.biases)):
        mean = sum(each.detach()[i] for i in range(4)) / 4
        assert float((stored[f"a.own_down.{name}"] - mean).abs().max()) < 1e-7
    assert torch.equal(stored["a.own_up.weight"], torch.ones(2, 3))


def test_the_mean_of_as_under_one_b_is_the_mean_of_the_products() -> None:
    layer, b, x = experts(bias=False), torch.randn(7, 5), torch.randn(3, 6)
    of_products = sum(x @ a.T @ b.T for a in layer.weights) / 4
    assert float((x @ layer.weight.T @ b.T - of_products).detach().abs().max()) < 1e-6


def test_the_divergence_is_that_of_the_formula_symmetric_and_zero_for_equals() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.2, 0.3, 0.5]])
    pairs = list(zip(p[0].tolist(), q[0].tolist(), strict=True))
    by_hand = sum(a * math.log(a / b) + b * math.log(b / a) for a, b in pairs) / 2
    assert float(divergence(p.log(), q.log())) == pytest.approx(by_hand, abs=1e-6)
    assert float(divergence(q.log(), p.log())) == pytest.approx(by_hand, abs=1e-6)
    assert float(divergence(p.log(), p.log())) == pytest.approx(0, abs=1e-7)


def test_both_passes_have_a_gradient() -> None:
    first, second = (torch.randn(4, 9, requires_grad=True) for _ in range(2))
    divergence(first, second).backward()
    assert first.grad is not None
    assert second.grad is not None
    assert bool(first.grad.any() and second.grad.any())


def test_experts_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Experts([nn.Linear(2, 3), nn.Linear(3, 3)])
