"""The learning rate over a run."""

import math

import pytest

from worker.training.schedule import rate_factor


def test_warm_up_is_linear_and_reaches_the_full_rate() -> None:
    factors = [rate_factor("constant", index, 100, 0.06) for index in range(100)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert set(factors[6:]) == {1.0}


def test_linear_falls_by_equal_steps_and_never_to_zero() -> None:
    factors = [rate_factor("linear", index, 10, 0.0) for index in range(10)]
    assert factors == pytest.approx([1 - index / 10 for index in range(10)])


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rate_factor("cosine", 0, 10, 0.0) == 1.0
    assert rate_factor("cosine", 5, 10, 0.0) == pytest.approx(0.5)
    assert rate_factor("cosine", 9, 10, 0.0) == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.06, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_every_step_has_a_rate_above_zero(schedule: str, ratio: float, total: int) -> None:
    for index in range(total):
        assert 0 < rate_factor(schedule, index, total, ratio) <= 1  # type: ignore[arg-type]
