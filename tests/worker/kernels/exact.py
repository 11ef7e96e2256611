"""What the tests of loops vary, and how near to the exact result is near enough."""

import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
THREADS = pytest.mark.parametrize("n_threads", [1, 2, 3])


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """What was summed in float32 is off by its last rounding only."""
    error = (found.double() - exact).norm() / exact.norm()
    assert float(error) < (3e-3 if found.dtype == torch.bfloat16 else 2e-6)
