"""Every loss over log-probabilities against values computed by hand."""

from math import exp, log

import pytest
import torch

from worker.training.losses import contrastive, masking, preference, tfew
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


RIGHT, WRONG = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.2]).log()


def test_tfew() -> None:
    """The values of the specification (methods, section 3.7)."""
    assert float(tfew.likelihood(RIGHT)) == pytest.approx(1.0397208)
    assert float(tfew.unlikelihood(WRONG)) == pytest.approx(0.2231436)
    scores = tfew.scores_of([RIGHT, WRONG])
    assert scores.tolist() == pytest.approx([-1.0397208, -1.6094379])
    assert float(tfew.length_normalised(scores)) == pytest.approx(0.4483237)


def test_the_wrong_tokens_of_tfew_weigh_the_same_whatever_choice_they_are_of() -> None:
    both = torch.cat([WRONG, torch.tensor([0.5, 0.1]).log()])
    expected = -(log(0.8) + log(0.5) + log(0.9)) / 3
    assert float(tfew.unlikelihood(both)) == pytest.approx(expected)
    assert float(tfew.unlikelihood(torch.zeros(1))) == pytest.approx(-log(1e-6), rel=0.02)


def test_equal_tokens_tie_whatever_the_length_of_the_choice() -> None:
    scores = tfew.scores_of([torch.full((3,), -0.7), torch.full((1,), -0.7)])
    assert float(tfew.length_normalised(scores)) == pytest.approx(log(2))


def test_a_pair_is_told_from_all_others_of_its_batch() -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    losses, hits = contrastive.in_batch(first, second, temperature=0.5)
    # Cosines are 1 on the diagonal and 0 beside it: -log(e^2 / (e^2 + e^0)).
    assert losses.tolist() == pytest.approx([-log(exp(2) / (exp(2) + 1))] * 2)
    assert hits.tolist() == [True, True]


def test_a_cosine_is_compared_with_its_score() -> None:
    first, second = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    losses, hits = contrastive.scored(first, second, torch.tensor([0.95, 0.5]))
    assert losses.tolist() == pytest.approx([0.0025, 0.25])
    assert hits.tolist() == [True, False]


def test_exactly_so_many_ids_are_chosen_and_none_that_may_not_be() -> None:
    maskable = torch.tensor([False] + [True] * 10 + [False])
    seen = torch.zeros(12)
    for seed in range(200):
        chosen = masking.choose(maskable, 3, generator=torch.Generator().manual_seed(seed))
        assert int(chosen.sum()) == 3
        seen += chosen
    assert seen[0] == seen[11] == 0
    assert (seen[1:11] > 30).all()


def test_words_are_hidden_whole_but_for_the_last() -> None:
    words = torch.tensor([-1, 0, 0, 0, 1, 2, 2, 3, -1])
    maskable = words >= 0
    for seed in range(50):
        chosen = masking.choose(maskable, 4, words, torch.Generator().manual_seed(seed))
        assert int(chosen.sum()) == 4
        parts = [chosen[words == word] for word in range(4)]
        assert sum(bool(part.any() and not part.all()) for part in parts) <= 1


def test_of_the_chosen_ids_8_of_10_become_the_mask_and_1_any_id() -> None:
    ids = torch.full((100_000,), 7)
    chosen = torch.arange(100_000) % 2 == 0
    read, targets = masking.corrupt(ids, chosen, 3, 1000, torch.Generator().manual_seed(0))
    assert (read[~chosen] == 7).all()
    assert (targets[~chosen] == IGNORED).all()
    assert (targets[chosen] == 7).all()
    share_masked = float((read[chosen] == 3).float().mean())
    share_kept = float((read[chosen] == 7).float().mean())
    assert share_masked == pytest.approx(0.8, abs=0.01)
    assert share_kept == pytest.approx(0.1, abs=0.01)


def test_masks_of_rows_are_drawn_row_by_row() -> None:
    maskable = torch.tensor([True] * 4 + [False] + [True] * 5)
    chosen = masking.choose_all(maskable, [4, 6], [1, 2], None, torch.Generator().manual_seed(0))
    assert [int(part.sum()) for part in chosen.split([4, 6])] == [1, 2]
