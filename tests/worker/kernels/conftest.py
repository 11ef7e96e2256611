"""Every test of a loop draws the same numbers and leaves PyTorch as many threads as it had."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def draws() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(n_threads)
