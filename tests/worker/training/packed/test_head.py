"""The chunked loss against torch's cross-entropy on all logits at once."""

import pytest
import torch
from torch.nn import functional

from worker.training.packed import head
from worker.training.packed.head import summed_cross_entropies, summed_cross_entropy


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("sizes", [(48 << 20, 16 << 20), (20 * 50 * 4, 8 * 50 * 4)])
def test_loss_hits_and_gradient_do_not_depend_on_the_chunks(
    has_bias: bool, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": sizes[0]})
    monkeypatch.setattr(head, "BLOCK_BYTES", sizes[1])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(53, 12, generator=generator).requires_grad_()
    weight = torch.randn(50, 12, generator=generator)
    bias = torch.randn(50, generator=generator) if has_bias else None
    targets = torch.randint(50, (53,), generator=generator)
    loss, n_correct = summed_cross_entropy(hidden, weight, bias, targets)
    (loss / 7).backward()
    twin = hidden.detach().clone().requires_grad_()
    logits = functional.linear(twin, weight, bias)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    (expected / 7).backward()
    torch.testing.assert_close(loss, expected)
    assert n_correct == (logits.argmax(-1) == targets).sum()
    torch.testing.assert_close(hidden.grad, twin.grad)


def test_runs_of_positions_have_the_losses_and_gradients_that_each_has_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(53, 12, generator=generator).requires_grad_()
    weight = torch.randn(50, 12, generator=generator)
    targets = torch.randint(50, (53,), generator=generator)
    sizes, shares = [20, 3, 30], torch.tensor([0.5, 2.0, 0.25])
    losses, n_correct = summed_cross_entropies(hidden, weight, None, targets, sizes)
    (losses * shares).sum().backward()
    twin = hidden.detach().clone().requires_grad_()
    runs = zip(twin.split(sizes), targets.split(sizes), strict=True)
    for index, (part, wanted) in enumerate(runs):
        loss, hits = summed_cross_entropy(part, weight, None, wanted)
        (loss * shares[index]).backward()
        torch.testing.assert_close(losses[index], loss)
        assert n_correct[index] == hits
    torch.testing.assert_close(hidden.grad, twin.grad)


def test_a_target_of_vanishing_probability_has_its_exact_loss() -> None:
    weight = torch.eye(3) * 1000
    loss, _ = summed_cross_entropy(torch.tensor([[1.0, 0.0, 0.0]]), weight, None, torch.tensor([1]))
    assert float(loss) == 1000


def test_an_evaluation_makes_no_gradient() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        loss, _ = summed_cross_entropy(hidden, torch.randn(5, 3), None, torch.tensor([0, 1, 2, 3]))
    assert not loss.requires_grad
