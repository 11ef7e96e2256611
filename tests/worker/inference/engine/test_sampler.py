"""Choosing tokens: greedy, temperature, cuts, penalties, bias, constraint, seed."""

from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from worker.inference.engine.errors import GenerationError
from worker.inference.engine.params import Sampling
from worker.inference.engine.sampler import _FIRST_LOOK, Sampler, token_logprobs

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(n: int = 3000, logits: torch.Tensor = LOGITS, **options: float) -> torch.Tensor:
    """Frequencies of each token over `n` draws."""
    sampler = Sampler(Sampling(max_tokens=1, seed=1, **options))  # type: ignore[arg-type]
    counts = torch.bincount(
        torch.tensor([sampler.pick(logits).token for _ in range(n)]), minlength=4
    )
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
        [sampler.pick(logits).token for _ in range(20)]
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
    [
        {"max_tokens": -1},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
    ],
)
def test_sampling_refuses_what_makes_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Sampling(**{"max_tokens": 1, **options})  # type: ignore[arg-type]


def greedy(logits: torch.Tensor, drawn: list[int] | None = None, **options: Any) -> int:
    """The greedy token after the tokens in `drawn`."""
    sampler = Sampler(Sampling(max_tokens=9, temperature=0, **options))
    for token in drawn or []:
        sampler.advance(token)
    return sampler.pick(logits).token


def test_top_k_keeps_the_k_likeliest() -> None:
    expected = torch.tensor([0.5, 0.3, 0.0, 0.0]) / 0.8
    torch.testing.assert_close(draws(temperature=1.0, top_k=2), expected, atol=0.03, rtol=0)
    torch.testing.assert_close(draws(temperature=1.0, top_k=99), LOGITS.exp(), atol=0.03, rtol=0)


def test_the_nucleus_is_of_what_top_k_left() -> None:
    # Of 0.5 and 0.3 renormalised, 0.625 alone reaches 0.6; of all four tokens 0.5 would not.
    assert draws(200, temperature=1.0, top_k=2, top_p=0.6).tolist() == [1, 0, 0, 0]


def test_min_p_is_relative_to_the_likeliest() -> None:
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    frequencies = draws(temperature=1.0, min_p=0.2)
    torch.testing.assert_close(frequencies, expected, atol=0.03, rtol=0)
    assert frequencies[3] == 0


def test_a_nucleus_wider_than_the_first_look_is_the_whole_nucleus() -> None:
    flat = torch.zeros(4 * _FIRST_LOOK)
    sampler = Sampler(Sampling(max_tokens=1, top_p=0.9, seed=3))
    assert len({sampler.pick(flat).token for _ in range(1000)}) > _FIRST_LOOK


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits = torch.tensor([3.0, 2.5, 0.0, 0.0])
    assert greedy(logits) == 0
    assert greedy(logits, [0, 0], presence_penalty=0.4) == 0
    assert greedy(logits, [0, 0], presence_penalty=0.6) == 1
    assert greedy(logits, [0], frequency_penalty=0.4) == 0
    assert greedy(logits, [0, 0], frequency_penalty=0.4) == 1
    assert greedy(logits, [1], presence_penalty=-0.6) == 1


def test_the_repetition_penalty_is_that_of_transformers_and_counts_the_prompt() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    prompt, drawn = [3, 4, 5, 4], [7, 8]
    sampler = Sampler(Sampling(max_tokens=9, repetition_penalty=1.7, seed=1), prompt)
    for token in drawn:
        sampler.advance(token)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([prompt + drawn]), logits.double()[None]
    )[0]
    torch.testing.assert_close(sampler._changed(logits.double()), expected)


def test_bias_moves_a_token_up_or_out() -> None:
    assert greedy(LOGITS, logit_bias={3: 100.0}) == 3
    assert greedy(LOGITS, logit_bias={0: -100.0, 1: -100.0}) == 2


def test_penalties_leave_the_models_own_logits_alone() -> None:
    logits = LOGITS.double()
    greedy(logits, [0], presence_penalty=2.0, logit_bias={1: 5.0})
    torch.testing.assert_close(logits, LOGITS.double())


class Only:
    """Allows the tokens of a text one by one."""

    def __init__(self, *tokens: int, size: int = 4) -> None:
        self.left, self.size = list(tokens), size

    @property
    def is_over(self) -> bool:
        return not self.left

    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[self.left[:1]] = True
        return mask

    def advance(self, token: int) -> None:
        assert token == self.left.pop(0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [3, 4, 9])
def test_a_constraint_is_kept_whatever_the_model_wants(temperature: float, size: int) -> None:
    constraint = Only(2, 1, size=size)
    sampler = Sampler(Sampling(max_tokens=9, temperature=temperature), (), constraint)
    drawn = []
    while not sampler.is_over:
        drawn.append(sampler.pick(LOGITS).token)
        sampler.advance(drawn[-1])
    assert drawn == [2, 1]
    with pytest.raises(GenerationError, match="allows no token"):
        sampler.pick(LOGITS)


def test_logprobs_are_of_the_model_before_everything_else() -> None:
    sampling = Sampling(
        max_tokens=1, temperature=0, logprobs=2, logit_bias={3: 100.0}, top_k=1, top_p=0.1
    )
    drawn = Sampler(sampling).pick(LOGITS)
    assert drawn.token == 3
    assert drawn.logprob == pytest.approx(float(LOGITS[3]), abs=1e-5)
    assert [token for token, _ in drawn.top] == [0, 1]
    assert drawn.top[0][1] == pytest.approx(float(LOGITS[0]), abs=1e-5)


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    [scored] = token_logprobs(LOGITS[None], [1], 20)
    assert len(scored.top) == 4
