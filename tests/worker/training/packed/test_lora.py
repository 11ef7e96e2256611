"""Groups of adapted layers against the formula, with several adapters in one batch."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from worker.training.packed import layout
from worker.training.packed.frozen import FrozenWeight
from worker.training.packed.layout import Layout, Segment
from worker.training.packed.lora import LinearGroup
from worker.training.packed.matrices import Pair

INPUTS, OUTPUTS = 6, (5, 4, 3)


def make_pair(outputs: int, seed: int, *, rank: int = 2, dropout: float = 0.0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    a = nn.Parameter(torch.randn(rank, INPUTS, generator=generator))
    b = nn.Parameter(torch.randn(outputs, rank, generator=generator))
    return Pair(a, b, 0.5 + seed, dropout)


def make_group(dropout: float = 0.0) -> tuple[LinearGroup, list[nn.Linear]]:
    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, outputs).requires_grad_(False) for outputs in OUTPUTS]
    pairs: dict[str, tuple[Pair | None, ...]] = {
        # The middle layer has no matrices, and the ranks differ.
        "one": (
            make_pair(5, 1, dropout=dropout),
            None,
            make_pair(3, 2, rank=4, dropout=dropout),
        ),
        "two": (make_pair(5, 3), make_pair(4, 4), None),
    }
    weights = [FrozenWeight(layer, cache=False) for layer in layers]
    return LinearGroup(weights, pairs), layers


def matrices_of(group: LinearGroup) -> list[nn.Parameter]:
    """Return A and B of each layer of each adapter."""
    pairs = [pair for several in group.pairs.values() for pair in several if pair is not None]
    return [matrix for pair in pairs for matrix in (pair.a, pair.b)]


def reference(
    x: torch.Tensor, layers: list[nn.Linear], pairs: Sequence[Pair | None]
) -> torch.Tensor:
    parts = []
    for layer, pair in zip(layers, pairs, strict=True):
        y = layer(x)
        parts.append(y if pair is None else y + pair.scale * (x @ pair.a.t() @ pair.b.t()))
    return torch.cat(parts, -1)


def test_values_and_gradients_are_the_formulas_for_each_adapter() -> None:
    group, layers = make_group()
    x = torch.randn(1, 7, INPUTS, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    rows = Layout([4, 3], (Segment(0, 4, "one"), Segment(4, 7, "two")))
    with layout.active(rows):
        found = group(x, training=True)
    expected = torch.cat(
        [
            reference(twin[:, :4], layers, group.pairs["one"]),
            reference(twin[:, 4:], layers, group.pairs["two"]),
        ],
        1,
    )
    torch.testing.assert_close(found, expected)
    outer = torch.randn(found.shape)
    parameters = matrices_of(group)
    found_gradients = torch.autograd.grad(found, [x, *parameters], outer)
    expected_gradients = torch.autograd.grad(expected, [twin, *parameters], outer)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_an_input_without_gradient_gets_none_and_the_matrices_theirs() -> None:
    group, _ = make_group()
    with layout.active(Layout.of([3], "one")):
        group(torch.randn(1, 3, INPUTS), training=True).sum().backward()
    pair = group.pairs["one"][0]
    assert pair is not None
    assert pair.a.grad is not None
    assert pair.b.grad is not None


def test_dropout_is_off_in_evaluation_and_repeats_with_torchs_generator() -> None:
    group, layers = make_group(dropout=0.5)
    x = torch.randn(1, 40, INPUTS)
    with layout.active(Layout.of([40], "one")):
        torch.testing.assert_close(
            group(x, training=False), reference(x, layers, group.pairs["one"])
        )
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first, second = group(x, training=True), group(x, training=True)
        torch.set_rng_state(state)
        assert torch.equal(group(x, training=True), first)
    assert not torch.equal(first, second)


def test_the_gradient_passes_through_the_very_dropout_of_the_forward_pass() -> None:
    group, _ = make_group(dropout=0.3)
    x = torch.randn(1, 5, INPUTS, requires_grad=True)
    pairs = group.pairs["one"]

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(9)
        with layout.active(Layout.of([5], "one")):
            return group(x, training=True)

    # With its masks fixed the map is linear in x, so that differences are exact derivatives.
    outer = torch.randn(run(x).shape)
    (gradient,) = torch.autograd.grad(run(x), x, outer)
    direction = torch.randn(x.shape)
    with torch.no_grad():
        change = ((run(x + direction) - run(x)) * outer).sum()
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-4, atol=1e-4)
    assert pairs[0] is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_the_product_runs_in_the_dtype_of_the_base_and_gradients_stay_wide(
    dtype: torch.dtype,
) -> None:
    layers = [nn.Linear(INPUTS, 5, dtype=dtype).requires_grad_(False)]
    pair = make_pair(5, 1)
    group = LinearGroup([FrozenWeight(layers[0], cache=False)], {"one": (pair,)})
    with layout.active(Layout.of([3], "one")):
        output = group(torch.randn(1, 3, INPUTS, dtype=dtype), training=True)
        output.sum().backward()
    assert output.dtype == dtype
    assert pair.a.grad is not None
    assert pair.a.grad.dtype == torch.float32


def test_a_change_of_the_weights_is_seen_by_the_next_pass() -> None:
    group, layers = make_group()
    x = torch.randn(1, 3, INPUTS)
    pair = group.pairs["one"][0]
    assert pair is not None
    optimizer = torch.optim.AdamW([pair.a, pair.b], lr=0.1, fused=True)
    for _ in range(2):
        with layout.active(Layout.of([3], "one")):
            output = group(x, training=True)
        torch.testing.assert_close(output, reference(x, layers, group.pairs["one"]))
        output.sum().backward()
        optimizer.step()  # does not raise the weights' version counters


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gated_product_is_that_of_the_gated_input(dropout: float) -> None:
    group, _ = make_group(dropout)
    both = torch.randn(1, 5, 2 * INPUTS, requires_grad=True)
    twin = both.detach().clone().requires_grad_()
    gate, up = twin.chunk(2, -1)
    with layout.active(Layout.of([5], "one")):
        torch.manual_seed(4)
        found = group.gated(both, training=True)
        torch.manual_seed(4)
        expected = group(nn.functional.silu(gate) * up, training=True)
    torch.testing.assert_close(found, expected)
    pairs = [pair for pair in group.pairs["one"] if pair is not None]
    parameters = [matrix for pair in pairs for matrix in (pair.a, pair.b)]
    outer = torch.randn(found.shape)
    found_gradients = torch.autograd.grad(found, [both, *parameters], outer)
    expected_gradients = torch.autograd.grad(expected, [twin, *parameters], outer)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other)
