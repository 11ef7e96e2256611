"""Dropout by bits: its statistics, its scale, its repeatability."""

import pytest
import torch

from worker.training.dropout import BitDropout, Drop

N = 400_000


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_of_zeros_is_p_and_the_mean_stays(p: float) -> None:
    torch.manual_seed(0)
    dropped = BitDropout(p)(torch.ones(N))
    deviation = (p * (1 - p) / N) ** 0.5
    assert abs(float((dropped == 0).float().mean()) - p) < 5 * deviation
    assert dropped.max() == pytest.approx(1 / (1 - p), rel=1e-3)
    assert dropped.mean() == pytest.approx(1, abs=5 * deviation / (1 - p) + 1e-3)


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    zero = (BitDropout(0.5)(torch.ones(N)) == 0).float()
    for distance in range(1, 9):
        both = float((zero[:-distance] * zero[distance:]).mean())
        assert both == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 4)])
def test_any_shape_and_type_is_kept(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        result = BitDropout(0.5)(torch.ones(shape, dtype=dtype))
        assert (result.shape, result.dtype) == (torch.Size(shape), dtype)


def test_the_gradient_flows_where_the_value_does() -> None:
    x = torch.ones(1000, requires_grad=True)
    result = BitDropout(0.3)(x)
    result.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, result.detach())


def test_evaluation_drops_nothing() -> None:
    x = torch.ones(10)
    assert BitDropout(0.5).eval()(x) is x


def test_a_generator_state_repeats_it() -> None:
    dropout, x = BitDropout(0.5), torch.ones(1000)
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
        BitDropout(p)


def test_a_drop_zeroes_the_same_elements_of_each_tensor_again() -> None:
    drop = Drop([0.3, 0.0, 0.3], 10, 100, 5, torch.device("cpu"))
    first, none, other = (drop.zero_(torch.ones(10, 100), index) for index in range(3))
    assert torch.equal(drop.zero_(torch.ones(1000)), first.flatten())
    assert 200 < int((first == 0).sum()) < 400
    assert not (none == 0).any()
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (0, 4)])
def test_nothing_and_a_single_number_are_taken(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert BitDropout(0.5)(torch.ones(shape)).shape == shape
