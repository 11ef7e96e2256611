"""Dropout by geometric gaps: its statistics, its scale, its repeatability."""

import numpy as np
import pytest
import torch

from worker.training.dropout import Drop, GapDropout, dropped_positions, seeded

N = 400_000


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_of_zeros_is_p_and_the_mean_stays(p: float) -> None:
    torch.manual_seed(0)
    dropped = GapDropout(p)(torch.ones(N))
    deviation = (p * (1 - p) / N) ** 0.5
    assert abs(float((dropped == 0).float().mean()) - p) < 5 * deviation
    assert dropped.max() == pytest.approx(1 / (1 - p), rel=1e-3)
    assert dropped.mean() == pytest.approx(1, abs=5 * deviation / (1 - p) + 1e-3)


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    zero = (GapDropout(0.5)(torch.ones(N)) == 0).float()
    for distance in range(1, 9):
        both = float((zero[:-distance] * zero[distance:]).mean())
        assert both == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 4)])
def test_any_shape_and_type_is_kept(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        result = GapDropout(0.5)(torch.ones(shape, dtype=dtype))
        assert (result.shape, result.dtype) == (torch.Size(shape), dtype)


def test_the_gradient_flows_where_the_value_does() -> None:
    x = torch.ones(1000, requires_grad=True)
    result = GapDropout(0.3)(x)
    result.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, result.detach())


def test_evaluation_drops_nothing() -> None:
    x = torch.ones(10)
    assert GapDropout(0.5).eval()(x) is x


def test_a_generator_state_repeats_it() -> None:
    dropout, x = GapDropout(0.5), torch.ones(1000)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = dropout(x)
    other = dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_a_probability_without_sense_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        GapDropout(p)


def test_a_draw_goes_on_until_the_last_element() -> None:
    class Small:
        """Gaps of one element each, as the rarest of draws has them."""

        def standard_exponential(self, n: int) -> np.ndarray:
            return np.zeros(n)

    found = dropped_positions(1000, 0.05, Small())  # type: ignore[arg-type]
    assert found.tolist() == list(range(1000))


def test_a_gap_past_the_end_drops_nothing() -> None:
    assert dropped_positions(3, 1e-15, seeded(0)).tolist() == []


def test_a_drop_zeroes_the_same_elements_again() -> None:
    drop = Drop(1000, 0.3, seeded(5), torch.device("cpu"))
    first, second = drop.zero_(torch.ones(10, 100)), drop.zero_(torch.ones(1000))
    assert torch.equal(first.flatten(), second)
    assert 200 < int((second == 0).sum()) < 400
