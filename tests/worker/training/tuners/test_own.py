"""Bottlenecks and replaced parameters: gradients, what is switched off, what is shared."""

import pytest
import torch
from torch import nn

from tests.worker.training.tiny import attach, tiny_llama
from worker.training.model import trainable_parameters
from worker.training.tuners.own import BottleneckConfig, BottleneckLayer

IDS = torch.arange(3, 15)[None]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_the_gradients_of_a_bottleneck_are_right() -> None:
    layer = BottleneckLayer(nn.Linear(4, 6), "a")
    layer.add("a", BottleneckConfig(r=3, std=0.5))
    x = torch.randn(2, 4, requires_grad=True)
    down, up = layer.own_down["a"], layer.own_up["a"]
    z = layer.base_layer(x)
    expected = z + up(nn.functional.gelu(down(z)))
    weights = [x, *down.parameters(), *up.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), weights)
    found = torch.autograd.grad(layer(x).square().sum(), weights)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wanted, found, strict=True))


def test_a_bottleneck_takes_tokens_that_are_flattened() -> None:
    layer = BottleneckLayer(nn.Linear(4, 6), "a")
    layer.add("a", BottleneckConfig(r=3))
    x = torch.randn(2, 5, 4)
    assert torch.allclose(layer(x).flatten(0, 1), layer(x.flatten(0, 1)), atol=1e-6)


def test_houlsby_has_two_bottlenecks_a_block_and_all_its_norms() -> None:
    model = attach(tiny_llama(), {"type": "houlsby", "r": 4})
    parameters = trainable_parameters(model)
    bottlenecks = 2 * 2 * (2 * 64 * 4 + 4 + 64)
    norms = 2 * 2 * 64  # RMS norms have no biases
    assert sum(each.numel() for each in parameters.values()) == bottlenecks + norms
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(each.grad is not None and each.grad.any() for each in parameters.values())
    frozen = [each for each in model.parameters() if not each.requires_grad]
    assert all(each.grad is None for each in frozen)


def test_without_its_up_projections_and_norms_the_base_is_back() -> None:
    base = tiny_llama()
    with torch.no_grad():
        expected = base(IDS).logits
        model = attach(base, {"type": "houlsby", "r": 4}).eval()
        for name, each in trainable_parameters(model).items():
            if ".own_up." in name:
                each.zero_()
        assert torch.equal(model(IDS).logits, expected)
        for name, each in trainable_parameters(model).items():
            if ".own_parameters." in name:
                each.add_(0.1)
        assert not torch.equal(model(IDS).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, expected)


def test_full_shares_what_the_base_shares_and_trains_every_parameter() -> None:
    base = tiny_llama()
    n_parameters = sum(each.numel() for each in base.parameters())
    model = attach(base, {"type": "full"})
    parameters = trainable_parameters(model)
    assert sum(each.numel() for each in parameters.values()) == n_parameters
    assert not any("lm_head" in name for name in parameters)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(each.grad is not None for each in parameters.values())
