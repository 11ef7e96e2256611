"""Every loss over log-probabilities against values computed by hand."""

from math import exp, log

import pytest
import torch

from worker.training.losses import preference
from worker.training.objectives.base import IGNORED, Batch


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_values_are_added_up_by_sequence() -> None:
    targets = torch.tensor([IGNORED, 5, 6, IGNORED, IGNORED, 7, IGNORED])
    batch = Batch(torch.zeros(7, dtype=torch.int64), targets, [4, 3])
    sums, counts = preference.per_sequence(torch.tensor([0.5, 0.25, 3.0]), batch)
    assert sums.tolist() == [0.75, 3.0]
    assert counts.tolist() == [2, 1]


def test_dpo() -> None:
    policy = torch.tensor([[-4.0, -6.0], [-5.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-5.0, -5.0], [-4.0, -2.0]])
    losses, in_order = preference.dpo(policy, reference, beta=0.5)
    # The margins are ((-4+5) - (-6+5)) · 0.5 = 1 and ((-5+4) - (-1+2)) · 0.5 = -1.
    assert losses.tolist() == pytest.approx([-log(sigmoid(1)), -log(sigmoid(-1))])
    assert in_order.tolist() == [True, False]
    losses.sum().backward()
    assert policy.grad is not None
    # d/dπ_w of -log σ(β Δ) is -β σ(-β Δ), and the rejected answer's is its negative.
    assert policy.grad[0].tolist() == pytest.approx([-0.5 * sigmoid(-1), 0.5 * sigmoid(-1)])


def test_dpo_with_labels_in_doubt() -> None:
    losses, _ = preference.dpo(torch.tensor([[-4.0, -6.0]]), torch.full((1, 2), -5.0), 0.5, 0.1)
    assert losses.tolist() == pytest.approx([-0.9 * log(sigmoid(1)) - 0.1 * log(sigmoid(-1))])


def test_an_untouched_policy_has_a_dpo_loss_of_log_2() -> None:
    same = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    losses, in_order = preference.dpo(same, same, 0.1)
    assert losses.tolist() == pytest.approx([log(2)] * 3)
    assert not in_order.any()


def test_simpo() -> None:
    losses, in_order = preference.simpo(torch.tensor([[-1.0, -1.5]]), beta=2.0, gamma=0.5)
    assert losses.tolist() == pytest.approx([-log(sigmoid(2 * 0.5 - 0.5))])
    assert in_order.tolist() == [True]


def test_orpo() -> None:
    # p = 0.5 and 0.2 are geometric means, so the odds are 1 and 1/4 and their ratio is 4.
    averages = torch.tensor([[log(0.5), log(0.2)]])
    losses, in_order = preference.orpo(averages, weight=0.1)
    assert losses.tolist() == pytest.approx([log(2) - 0.1 * log(sigmoid(log(4)))])
    assert in_order.tolist() == [True]


def test_kto() -> None:
    policy = torch.tensor([[-4.0, -6.0], [-3.0, -2.0]])
    reference = torch.tensor([[-5.0, -5.0], [-5.0, -5.0]])
    # Rewards: 1 and -1; 2 and 3. So z is 1.5 of the preferred, 1 of the rejected ones.
    losses, in_order = preference.kto(policy, reference, beta=0.5)
    expected = [
        2 - sigmoid(0.5 * (1 - 1)) - sigmoid(0.5 * (1.5 + 1)),
        2 - sigmoid(0.5 * (2 - 1)) - sigmoid(0.5 * (1.5 - 3)),
    ]
    assert losses.tolist() == pytest.approx(expected)
    assert in_order.tolist() == [True, False]


def test_the_reference_point_of_kto_is_never_below_0() -> None:
    losses, _ = preference.kto(torch.tensor([[-6.0, -7.0]]), torch.full((1, 2), -5.0), beta=1.0)
    assert losses.tolist() == pytest.approx([2 - sigmoid(-1) - sigmoid(2)])
