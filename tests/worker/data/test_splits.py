"""The carved validation split follows from the rows' content and the seed alone."""

import numpy as np
import pytest

from worker.data.splits import held_out


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


@pytest.mark.parametrize(("count", "fraction"), [(1000, 0.1), (1000, 0.5), (37, 0.25)])
def test_the_share_is_exact_when_all_rows_differ(count: int, fraction: float) -> None:
    assert held_out(numbers(count), fraction, 7).sum() == round(count * fraction)


def test_order_does_not_matter_and_the_seed_does() -> None:
    rows = numbers(500)
    mask = held_out(rows, 0.2, 7)
    order = np.random.default_rng(1).permutation(500)
    assert (held_out(rows[order], 0.2, 7) == mask[order]).all()
    assert (held_out(rows, 0.2, 8) != mask).any()


def test_most_held_out_rows_stay_so_when_rows_are_added() -> None:
    rows = numbers(1000)
    before = held_out(rows, 0.2, 7)
    after = held_out(np.concatenate([rows, numbers(50, seed=2)]), 0.2, 7)[:1000]
    assert (before & after).sum() >= 0.9 * before.sum()


def test_rows_that_are_alike_are_on_one_side() -> None:
    rows = np.repeat(numbers(50), 4)
    mask = held_out(rows, 0.3, 7).reshape(50, 4)
    assert (mask.all(axis=1) | (~mask).all(axis=1)).all()
    assert 0.2 < mask.mean() < 0.4


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_small_set_keeps_a_row_on_each_side(count: int) -> None:
    for fraction in (0.01, 0.5, 0.99):
        assert 1 <= held_out(numbers(count), fraction, 7).sum() < count


def test_nothing_is_held_out_where_nothing_can_be() -> None:
    assert held_out(numbers(0), 0.5, 7).shape == (0,)
    assert not held_out(numbers(1), 0.5, 7).any()
    assert not held_out(np.full(9, 3, np.uint64), 0.5, 7).any()
    assert not held_out(numbers(9), 0.0, 7).any()
