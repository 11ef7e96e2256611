"""RMS normalisation against the library's formula."""

import pytest
import torch

from worker.training.packed.norm import RmsNorm, can_divide


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * normal.to(x.dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("divides", [True, False])
def test_values_and_gradients_are_the_formulas(
    dtype: torch.dtype, rtol: float, divides: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(64, generator=generator).to(dtype)
    x = (torch.randn(2, 5, 64, generator=generator) * 3).to(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    outer = torch.randn(2, 5, 64, generator=generator).to(dtype)
    found, expected = RmsNorm.apply(x, weight, 1e-5, divides), reference(twin, weight)
    assert found.dtype == dtype
    found.backward(outer)
    expected.backward(outer)
    assert x.grad is not None
    assert twin.grad is not None
    for one, other in ((found, expected), (x.grad, twin.grad)):
        assert (one - other).float().norm() <= rtol * other.float().norm()


def test_a_row_of_zeros_gives_zeros_and_finite_gradients() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    RmsNorm.apply(x, torch.ones(8), 1e-5, True).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_weight_of_zero_is_not_divided_by() -> None:
    assert can_divide(torch.tensor([1.0, -0.5]))
    assert not can_divide(torch.tensor([1.0, 0.0]))
    assert not can_divide(torch.tensor([1.0, 1e-36]))
    assert not can_divide(torch.tensor([1.0, 1e-2], dtype=torch.float16))


def test_nothing_is_kept_but_the_output_and_a_number_for_each_token() -> None:
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    weight = torch.ones(32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = RmsNorm.apply(x, weight, 1e-5, True)
    own = [each for each in kept if each.data_ptr() not in (y.data_ptr(), weight.data_ptr())]
    assert [each.numel() for each in own] == [6]
