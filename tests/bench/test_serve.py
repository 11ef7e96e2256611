"""What the bench of serving compares with what."""

import pytest

from bench.serve import AFTER, ANY, BEFORE, N_ACTIVE, N_SLOTS, Figures, Results, ratios


def test_many_adapters_are_compared_with_the_mean_of_8_right_before_and_after() -> None:
    results: Results = {
        ("ours", 0, 8): Figures(400.0),
        ("ours", 8, 8): Figures(300.0),
        ("ours", 8, N_SLOTS): Figures(1.0),  # measured long before
        (BEFORE, 8, N_SLOTS): Figures(400.0),
        (ANY, N_ACTIVE, N_SLOTS): Figures(150.0, first_max_s=2.5),
        (AFTER, 8, N_SLOTS): Figures(200.0),
    }
    assert ratios(results) == pytest.approx(
        {
            "adapters8_vs_own_base": 0.75,
            "active100_vs_adapters8": 0.5,
            "active100_max_wait_s": 2.5,
        }
    )
