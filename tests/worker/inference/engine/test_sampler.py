"""Choosing tokens: greedy, temperature, nucleus, seed."""

import pytest
import torch

from worker.inference.engine.errors import GenerationError
from worker.inference.engine.params import Sampling
from worker.inference.engine.sampler import Sampler

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(n: int = 4000, logits: torch.Tensor = LOGITS, **options: float) -> torch.Tensor:
    """Frequencies of each token over `n` draws."""
    sampler = Sampler(Sampling(max_tokens=1, seed=1, **options))  # type: ignore[arg-type]
    counts = torch.bincount(torch.tensor([sampler.pick(logits) for _ in range(n)]), minlength=4)
    return counts / n


def test_temperature_zero_always_takes_the_likeliest() -> None:
    assert draws(50, temperature=0).tolist() == [1, 0, 0, 0]


def test_temperature_one_draws_from_the_distribution_itself() -> None:
    torch.testing.assert_close(draws(temperature=1.0), LOGITS.exp(), atol=0.03, rtol=0)


def test_temperature_sharpens_as_the_formula_says() -> None:
    expected = torch.softmax(LOGITS / 0.5, dim=0)
    torch.testing.assert_close(draws(temperature=0.5), expected, atol=0.03, rtol=0)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert draws(50, temperature=1e-300).tolist() == [1, 0, 0, 0]


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    frequencies = draws(temperature=1.0, top_p=0.75)
    expected = torch.tensor([0.5, 0.3, 0.0, 0.0]) / 0.8
    torch.testing.assert_close(frequencies, expected, atol=0.03, rtol=0)
    assert frequencies[2:].sum() == 0


def test_nucleus_keeps_the_likeliest_token_however_small_top_p_is() -> None:
    assert draws(50, temperature=1.0, top_p=1e-6).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 5, -(2**70)])
def test_same_seed_same_draws_and_another_seed_others(seed: int) -> None:
    logits = torch.zeros(1000)
    first, second, other = (
        [sampler.pick(logits) for _ in range(20)]
        for sampler in (Sampler(Sampling(1, seed=s)) for s in (seed, seed, seed + 1))
    )
    assert first == second != other


def test_without_a_seed_two_samplers_differ() -> None:
    logits = torch.zeros(100_000)
    first, second = (Sampler(Sampling(1)) for _ in range(2))
    assert [first.pick(logits) for _ in range(5)] != [second.pick(logits) for _ in range(5)]


def test_nan_is_an_error_and_no_token() -> None:
    with pytest.raises(GenerationError, match="NaN"):
        Sampler(Sampling(1, temperature=0)).pick(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"stop": ("",)}],
)
def test_sampling_refuses_what_makes_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Sampling(**{"max_tokens": 1, **options})  # type: ignore[arg-type]
