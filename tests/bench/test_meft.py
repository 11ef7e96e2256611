"""What bench.meft shows: the inverse in floats grows worse by the layer; how bytes are counted."""

import torch
from torch import nn

from bench._activations import saved_bytes
from bench._float_inverse import float_errors
from worker.training.reversible.streams import Block, Coupling, Plan

D = 16


def test_the_inverse_in_floats_loses_a_digit_with_every_layer() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(12)]
    couplings = [Coupling(Block(each, ()), None, 3, 0, swaps=True) for each in layers]
    errors = float_errors(Plan(couplings, output=1), torch.randn(2, 5, D), 0.1)
    assert errors[0] < 1e-5
    assert errors[5] > 100 * errors[0]
    assert errors[-1] > 100 * errors[5]


def test_only_what_the_graph_keeps_is_counted() -> None:
    layer = nn.Linear(D, D)
    x = torch.randn(4, D, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == x.nbytes
    assert saved_bytes(lambda: layer(x).exp().log()) == 2 * x.nbytes
