"""Layers with one input: computed together, handed out one by one."""

import pytest
import torch
from torch import nn

from worker.training.packed import layout
from worker.training.packed.frozen import FrozenWeight
from worker.training.packed.layout import Layout
from worker.training.packed.lora import LinearGroup
from worker.training.packed.siblings import SharedInput


@pytest.fixture
def shared() -> SharedInput:
    layers = [nn.Linear(3, outputs).requires_grad_(False) for outputs in (2, 4)]
    weights = [FrozenWeight(layer, cache=False) for layer in layers]
    return SharedInput(LinearGroup(weights, {"one": (None, None)}), 2)


def product(shared: SharedInput, x: torch.Tensor) -> torch.Tensor:
    parts = [nn.functional.linear(x, each.get(), each.bias) for each in shared.group.weights]
    return torch.cat(parts, -1)


def test_each_layer_gets_its_part_and_nothing_is_kept_after_the_last(shared: SharedInput) -> None:
    x = torch.randn(1, 5, 3)
    with layout.active(Layout.of([5], "one")):
        first, second = (shared.take(x, index, training=False) for index in range(2))
    whole = product(shared, x)
    torch.testing.assert_close(torch.cat([first, second], -1), whole)
    assert shared._x is None


def test_another_input_is_never_answered_from_the_first(shared: SharedInput) -> None:
    x, other = torch.randn(1, 5, 3), torch.randn(1, 5, 3)
    with layout.active(Layout.of([5], "one")):
        shared.take(x, 0, training=False)
        found = shared.take(other, 1, training=False)
    whole = product(shared, other)
    torch.testing.assert_close(found, whole[..., 2:])
