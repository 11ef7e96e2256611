"""Attention within rows on a GPU is the formula's, forward and backward."""

import pytest
import torch

from tests.worker.training.packed.test_attend import SCALE, exact_attention
from worker.training.packed.flash import FlashAttention
from worker.training.packed.layout import Layout
from worker.training.packed.ways import attention_of


class Elsewhere:
    device = torch.device("cuda:0")
    dtype = torch.bfloat16


def test_it_is_the_way_on_a_gpu() -> None:
    assert attention_of(Elsewhere()) is FlashAttention  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "width", "takes"),
    [
        ((8, 0), 128, True),
        ((9, 0), 256, True),
        ((7, 5), 128, False),
        ((9, 0), 36, False),
        ((9, 0), 264, False),
    ],
)
def test_it_takes_heads_that_the_kernel_was_built_for(
    capability: tuple[int, int], width: int, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert FlashAttention.takes(Elsewhere(), width) is takes  # type: ignore[arg-type]
    assert not FlashAttention.takes(torch.ones(2), width)


@pytest.mark.gpu
@pytest.mark.parametrize("with_turns", [False, True])
@pytest.mark.parametrize(
    ("heads", "width", "lengths"),
    [((4, 4), 8, [7, 6, 7, 3, 1]), ((6, 2), 64, [200, 1, 65]), ((8, 1), 128, [300, 33])],
)
def test_results_and_gradients_are_those_of_the_formula(
    with_turns: bool, heads: tuple[int, int], width: int, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    n, (n_heads, n_keys) = sum(lengths), heads
    # Side by side, as a product leaves them.
    together = torch.randn(n, n_heads + 2 * n_keys, width).bfloat16().cuda()
    angles = torch.randn(n, width // 2)
    angles = torch.cat((angles, angles), -1)
    turns = (angles.cos().bfloat16(), angles.sin().bfloat16()) if with_turns else None
    gradient = torch.randn(n, n_heads, width).bfloat16()
    sizes = [n_heads, n_keys, n_keys]
    twins = [each.double().cpu().requires_grad_() for each in together.split(sizes, 1)]
    exact = exact_attention(twins, turns, lengths)
    expected = torch.autograd.grad(exact, twins, gradient.double())
    rows = Layout.of(lengths, "default")
    told = None if turns is None else (turns[0].cuda(), turns[1].cuda())
    output = torch.empty(n, n_heads, width, dtype=torch.bfloat16, device="cuda")
    saved = FlashAttention.attend(together.split(sizes, 1), told, SCALE, rows, output)
    sent = torch.empty_like(together)
    to_projected = sent.split(sizes, 1)
    FlashAttention.attend_back(gradient.cuda(), saved, told, SCALE, rows, to_projected)
    for found, wanted in zip((output, *to_projected), (exact, *expected), strict=True):
        error = (found.double().cpu() - wanted).norm() / wanted.norm()
        assert float(error) < 1.5e-2
