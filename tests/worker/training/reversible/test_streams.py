"""A stack of two streams: exact inverse, right gradients, flat memory; and when it has to fail."""

from typing import Any

import pytest
import torch
from torch import nn

from bench._activations import saved_bytes
from worker.fixed_point import GRID
from worker.training.reversible.streams import Block, Coupling, NotReversibleError, Plan, run

B, T, D = 2, 5, 16
BITS = 3
VARIANTS = {
    "meft1": (BITS, 0, True, 1),
    "meft2": (0, BITS, True, 0),
    "meft3": (BITS, BITS, False, 1),
}


class Part(nn.Module):
    """Something with the shape of a layer: D to D through a non-linearity, perhaps with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.dropout(torch.nn.functional.gelu(self.up(x))))


def parts(n_layers: int, dropout: float = 0.0) -> list[tuple[Part, Part]]:
    torch.manual_seed(0)
    return [(Part(dropout), Part(dropout)) for _ in range(n_layers)]


def plan_of(layers: list[tuple[Part, Part]], variant: str = "meft1", **options: Any) -> Plan:
    f_bits, g_bits, swaps, output = VARIANTS[variant]
    couplings = []
    for pair in layers:
        f, g = (Block(each, tuple(each.parameters())) for each in pair)
        couplings.append(Coupling(f, g, f_bits, g_bits, swaps))
    return Plan(couplings, output=output, **options)


def in_floats(layers: list[tuple[Part, Part]], variant: str, x: torch.Tensor) -> torch.Tensor:
    """The same stack by plain autograd in float64."""
    f_bits, g_bits, swaps, output = VARIANTS[variant]
    x1 = x2 = x
    for f, g in layers:
        y1 = x1 / 2**f_bits + f(x2)
        y2 = x2 / 2**g_bits + g(y1)
        x1, x2 = (y2, y1) if swaps else (y1, y2)
    return (x1, x2)[output]


def gradients(
    output: torch.Tensor, x: torch.Tensor, layers: list[tuple[Part, Part]]
) -> torch.Tensor:
    """All gradients of a made-up loss in one vector."""
    wanted = [x, *(each for pair in layers for part in pair for each in part.parameters())]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    found = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(w) if g is None else g).flatten().double()
            for g, w in zip(found, wanted, strict=True)
        ]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_are_those_of_plain_autograd(variant: str) -> None:
    layers = parts(6)
    x = torch.randn(B, T, D, requires_grad=True)
    plan = plan_of(layers, variant, history=[])
    output = run(plan, x)
    found = gradients(output, x, layers)
    assert plan.n_mismatches == 0
    assert plan.history == []  # every layer was compared
    doubled = [tuple(part.double() for part in pair) for pair in layers]
    x64 = x.detach().double().requires_grad_()
    reference = in_floats(doubled, variant, x64)  # type: ignore[arg-type]
    expected = gradients(reference, x64, doubled)  # type: ignore[arg-type]
    output, reference = output.detach(), reference.detach()
    assert float((output.double() - reference).norm() / reference.norm()) < 1e-5
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.99999


def test_dropout_is_drawn_once_and_repeated_on_the_way_back() -> None:
    layers = parts(3, dropout=0.5)
    x = torch.randn(B, T, D, requires_grad=True)
    torch.manual_seed(1)
    plan = plan_of(layers, history=[])
    output = run(plan, x)
    after = torch.get_rng_state()
    found = gradients(output, x, layers)
    assert plan.n_mismatches == 0
    assert torch.equal(torch.get_rng_state(), after)  # the way back draws nothing of its own
    torch.manual_seed(1)
    kept = run(plan_of(layers, keeps_inputs=True), x)
    assert torch.equal(kept, output)
    assert torch.equal(gradients(kept, x, layers), found)
    assert not torch.equal(run(plan_of(layers), x), output)


def test_without_gradients_the_same_comes_out() -> None:
    layers = parts(2)
    x = torch.randn(B, T, D)
    with torch.no_grad():
        assert torch.equal(run(plan_of(layers), x), run(plan_of(layers), x))
        plain = run(plan_of(layers), x)
    assert torch.equal(plain, run(plan_of(layers), x).detach())


def test_autocast_holds_on_the_way_back() -> None:
    layers = parts(4)
    x = torch.randn(B, T, D, requires_grad=True)
    plan = plan_of(layers, history=[])
    with torch.autocast("cpu", torch.bfloat16):
        output = run(plan, x)
    gradients(output, x, layers)
    assert plan.n_mismatches == 0


def test_a_layer_adds_the_bits_that_its_shift_loses_and_no_more() -> None:
    x = torch.randn(B, T, D, requires_grad=True)
    exact, plain = [], []
    for depth in (6, 12, 24):
        layers = parts(depth)
        exact.append(saved_bytes(lambda layers=layers: run(plan_of(layers), x)))  # type: ignore[misc]
        plain.append(
            saved_bytes(lambda layers=layers: in_floats(layers, "meft1", x))  # type: ignore[misc]
        )
    n = B * T * D
    assert exact == [2 * 8 * n + depth * n * BITS // 8 for depth in (6, 12, 24)]
    assert plain[2] > 3.5 * plain[0]
    assert exact[2] < 0.1 * plain[2]


def test_what_is_not_finite_shows_in_the_output() -> None:
    layers = parts(2)
    x = torch.randn(B, T, D, requires_grad=True)
    with torch.no_grad():
        layers[0][0].down.bias[0] = torch.inf
    output = run(plan_of(layers), x)
    assert output.isnan().all()
    output.sum().backward()  # the loop reports the loss, not a stack that does not come back


def test_a_device_that_does_not_repeat_itself_is_found_out() -> None:
    layers = parts(2)
    calls = 0

    def unsteady(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x * (1 + calls / GRID)

    plan = plan_of(layers)
    plan.couplings = [*plan.couplings, Coupling(Block(unsteady, ()), None, BITS, 0, swaps=True)]
    x = torch.randn(B, T, D, requires_grad=True)
    with pytest.raises(NotReversibleError, match=r"peft\.reversible"):
        run(plan, x).sum().backward()
    plan.keeps_inputs = True
    run(plan, x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
