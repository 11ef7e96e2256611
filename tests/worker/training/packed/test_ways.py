"""Both ways of a group's products are the formula's, whatever the sizes, dropout included."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

from tests.worker.kernels.test_masks import kept
from tests.worker.training.packed.test_lora import matrices_of
from worker.kernels import tiles
from worker.kernels.training import draw_masks
from worker.training.dropout import draw_seed
from worker.training.packed import layout, lora
from worker.training.packed.frozen import FrozenWeight
from worker.training.packed.layout import Layout, Segment
from worker.training.packed.loop_products import LoopProducts
from worker.training.packed.lora import LinearGroup
from worker.training.packed.matrices import Pair
from worker.training.packed.products import Products
from worker.training.packed.torch_products import TorchProducts
from worker.training.packed.ways import products_of

NEEDS_LOOPS = pytest.mark.skipif(
    not tiles.is_supported(), reason="this processor has no AVX512-BF16"
)
WAYS = pytest.mark.parametrize(
    "how", [TorchProducts, pytest.param(LoopProducts, marks=NEEDS_LOOPS)]
)
RANKS = {"one": 4, "two": 21}


def test_loops_are_for_bfloat16_where_there_is_the_instruction() -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    assert products_of(x) is (LoopProducts if tiles.is_supported() else TorchProducts)
    assert products_of(x.float()) is TorchProducts


def make_group(
    inputs: int, outputs: Sequence[int], dropout: float, ranks: dict[str, int]
) -> tuple[LinearGroup, list[nn.Linear]]:
    """Return layers of which the second adapter has no pair in the second one."""
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, n).bfloat16().requires_grad_(False) for n in outputs]
    pairs: dict[str, list[Pair | None]] = {
        name: [
            Pair(
                nn.Parameter(torch.randn(rank + index, inputs) / inputs**0.5),
                nn.Parameter(torch.randn(n, rank + index) / rank**0.5),
                1.5 + index,
                dropout,
            )
            for index, n in enumerate(outputs)
        ]
        for name, rank in ranks.items()
    }
    if "two" in pairs and len(outputs) > 1:
        pairs["two"][1] = None
    weights = [FrozenWeight(layer, cache=False) for layer in layers]
    return LinearGroup(weights, pairs), layers


def exact_output(
    x: torch.Tensor, group: LinearGroup, layers: list[nn.Linear], rows: Layout
) -> torch.Tensor:
    """Return the formula in float64, with dropout of the seeds that a pass would take."""
    parts = []
    for segment in rows.segments:
        own = x[segment.start : segment.end].double()
        row = group.pairs.get(segment.adapter, [None] * len(layers))
        known = [pair for pair in row if pair is not None]
        masks: Iterator[torch.Tensor] = iter(())
        if any(pair.dropout for pair in known):
            rates, (n, width) = [pair.dropout for pair in known], own.shape
            masks = iter(kept(draw_masks(rates, n, width, draw_seed()), width))
        outputs = []
        for layer, pair in zip(layers, row, strict=True):
            y = own @ layer.weight.double().t() + layer.bias.double()
            if pair is not None:
                mask = next(masks, torch.ones(()))
                factor = pair.scale / (1 - pair.dropout)
                y = y + factor * (own * mask) @ pair.a.double().t() @ pair.b.double().t()
            outputs.append(y)
        parts.append(torch.cat(outputs, -1))
    return torch.cat(parts)


@WAYS
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    ("inputs", "outputs", "lengths", "ranks"),
    [
        (64, (48, 16, 16), (25, 15), RANKS),
        (50, (7, 130), (1, 39), RANKS),
        (1600, (20,), (70, 130), RANKS),
        (66, (1700, 3), (49, 100), {"one": 50, "two": 1}),
        (64, (32,), (40, 8), {"two": 16}),  # the first rows have no adapter
        (64, (32, 8), (9, 8), {}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_formula(  # noqa: PLR0913 - what is varied
    how: type[Products],
    n_threads: int,
    dropout: float,
    inputs: int,
    outputs: tuple[int, ...],
    lengths: tuple[int, int],
    ranks: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "products_of", lambda _: how)
    group, layers = make_group(inputs, outputs, dropout, ranks)
    first, n = lengths[0], sum(lengths)
    rows = Layout(list(lengths), (Segment(0, first, "one"), Segment(first, n, "two")))
    x = torch.randn(n, inputs).bfloat16().requires_grad_()
    outer = torch.randn(n, sum(outputs)).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        torch.manual_seed(3)  # of dropout
        with layout.active(rows):
            output = group(x[None], training=True)[0]
        found = [output.detach(), *torch.autograd.grad(output, [x, *matrices_of(group)], outer)]
    finally:
        torch.set_num_threads(before)
    torch.manual_seed(3)
    exact = exact_output(x, group, layers, rows)
    expected = [
        exact.detach(),
        *torch.autograd.grad(exact, [x, *matrices_of(group)], outer.double()),
    ]
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert float(error) < 8e-3
    assert {each.dtype for each in found[2:]} <= {torch.float32}


@NEEDS_LOOPS
def test_a_part_has_the_same_bits_alone_and_beside_others() -> None:
    group, _ = make_group(64, (48, 16), 0.25, RANKS)
    x = torch.randn(1, 70, 64).bfloat16()
    outer = torch.randn(1, 70, 64).bfloat16()

    def run(start: int, end: int, segments: tuple[Segment, ...]) -> list[torch.Tensor]:
        own = x[:, start:end].clone().requires_grad_()
        pairs = [pair for pair in group.pairs["two"] if pair is not None]
        parameters = [matrix for pair in pairs for matrix in (pair.a, pair.b)]
        with layout.active(Layout([end - start], segments)):
            output = group(own, training=True)
        found = torch.autograd.grad(output, [own, *parameters], outer[:, start:end])
        return [output[0, -30:], found[0][0, -30:], *found[1:]]

    def seeds() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    both = run(0, 70, (Segment(0, 40, "one", seeds()), Segment(40, 70, "two", seeds())))
    alone = run(40, 70, (Segment(0, 30, "two", seeds()),))
    for one, other in zip(both, alone, strict=True):
        assert torch.equal(one, other)


@NEEDS_LOOPS
def test_rows_that_loops_cannot_read_are_refused() -> None:
    group, _ = make_group(64, (48,), 0.0, RANKS)
    with layout.active(Layout.of([6], "one")):
        parts, _ = group.parts(torch.ones(6, 64).bfloat16(), training=True)
    for x in (torch.ones(64, 6).bfloat16().t(), torch.ones(6, 64)):
        with pytest.raises(ValueError, match="are not read"):
            LoopProducts.multiply(x, group.weights, parts)
