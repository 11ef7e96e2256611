"""Which operators a tensor has: loops on a CPU, kernels on a GPU if they can be compiled."""

from collections.abc import Iterator

import pytest
import torch
from structlog.testing import capture_logs

from worker.gpu import operators as on_gpu
from worker.training.packed import between
from worker.training.packed.between import LoopOperators, operators_of


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    between._gpu_operators.cache_clear()
    yield
    between._gpu_operators.cache_clear()


class Elsewhere:
    """What is asked of a tensor on a GPU."""

    device = torch.device("cuda:0")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cpu_has_loops(dtype: torch.dtype) -> None:
    assert isinstance(operators_of(torch.ones(2, dtype=dtype)), LoopOperators)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_numbers_on_a_cpu_have_none(dtype: torch.dtype) -> None:
    assert operators_of(torch.ones(2, dtype=dtype)) is None


def test_a_gpu_has_kernels_that_were_tried_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(on_gpu, "try_out", tried.append)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert operators_of(Elsewhere(dtype)) is on_gpu  # type: ignore[arg-type]
    assert operators_of(Elsewhere(torch.float64)) is None  # type: ignore[arg-type]
    assert tried == ["cuda"]


def test_where_no_kernel_can_be_compiled_pytorch_does_it_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: str) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(on_gpu, "try_out", fail)
    with capture_logs() as logs:
        assert operators_of(Elsewhere(torch.bfloat16)) is None  # type: ignore[arg-type]
        assert operators_of(Elsewhere(torch.bfloat16)) is None  # type: ignore[arg-type]
    assert [(each["event"], each["reason"]) for each in logs] == [
        ("no_gpu_kernels", "RuntimeError: Failed to find C compiler.")
    ]
