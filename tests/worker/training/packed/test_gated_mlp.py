"""The gated product against autograd."""

import torch
from torch.nn import functional

from worker.training.packed.gated_mlp import SiluProduct


def test_values_and_gradients_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(3, 10, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(SiluProduct.apply, (both,))
    gate, up = both.chunk(2, -1)
    torch.testing.assert_close(SiluProduct.apply(both), functional.silu(gate) * up)
