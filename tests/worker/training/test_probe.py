"""The measurement itself, on a tiny model, and the arithmetic behind it."""

from collections.abc import Sequence

import pytest

from models.domain.training import Precision
from tests.worker.training.service import Service
from worker.launch import MEMORY_ENVIRONMENT
from worker.training import probe
from worker.training.loop import TOKENS_PER_MICRO_BATCH
from worker.training.objectives.base import Example
from worker.training.probe import MANY_SHAPES, PLANS, measure, non_negative_fit


def test_a_fit_finds_the_coefficients() -> None:
    features = [[1, 10, 100], [1, 20, 50], [1, 30, 10], [1, 5, 70]]
    values = [sum(c * x for c, x in zip((0.5, 0.01, 2e-4), row, strict=True)) for row in features]
    assert non_negative_fit(features, values) == pytest.approx([0.5, 0.01, 2e-4])


def test_what_would_be_negative_is_left_out() -> None:
    features = [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]
    assert non_negative_fit(features, [3.0, 2.0, 1.0]) == pytest.approx([2.0, 0.0])


def test_the_quickest_plan_is_an_eighth_of_the_most_precise() -> None:
    tokens = [plan.tokens(1024) for plan in PLANS]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[-1] * 8 < tokens[0]


@pytest.mark.parametrize("seconds", [45.0, 0.0], ids=["quick device", "slow device"])
def test_a_base_model_is_measured(
    service: Service, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_tokens: list[int] = []
    run = probe._Stand._pass

    def spy(stand: probe._Stand, batch: Sequence[Example], *, backward: bool) -> float:
        n_tokens.append(sum(len(example.input_ids) for example in batch))
        return run(stand, batch, backward=backward)

    monkeypatch.setattr(probe._Stand, "_pass", spy)
    found = measure(service.settings, "tiny", Precision(type="fp32"), seconds)
    assert found.device.startswith("CPU, ")
    assert found.n_adapter > 0
    assert found.fixed_bytes > 50_000_000
    assert found.token_seconds + found.batch_seconds + found.trained_seconds > 0
    assert min(found.square_seconds, found.token_bytes, found.update_seconds) >= 0
    assert 0 < found.forward_share < float("inf")  # how much is a matter of what runs beside
    plan = PLANS[0] if seconds else PLANS[-1]
    budget = TOKENS_PER_MICRO_BATCH["cpu"]
    assert max(n_tokens) == budget // plan.divisor
    chosen_by = 64 + budget // 8
    assert sum(n_tokens) <= plan.tokens(budget) + chosen_by + sum(MANY_SHAPES)


def test_kernels_of_as_many_shapes_as_are_kept_are_met_before_memory_is_measured() -> None:
    shapes_of_a_pass = 50  # of SmolLM2's layers with LoRA, forward and backward
    kept = int(MEMORY_ENVIRONMENT["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
    assert len(set(MANY_SHAPES)) * shapes_of_a_pass >= kept
