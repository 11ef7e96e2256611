"""What every objective promises on a tiny causal model, and what sets each apart."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.errors import InvalidRequestError
from tests.worker.training.tiny import make_examples, make_spec, make_trainer
from worker.training import objectives
from worker.training.loop import Trainer
from worker.training.losses import preference
from worker.training.objectives.base import Example

PAIRS = ("dpo", "kto", "orpo", "simpo")
CAUSAL = ("sft", "text", *PAIRS)


def make_pairs(n_rows: int, *, seed: int = 0) -> list[Example]:
    """Prompts of 5 ids with two answers each: one counts upwards, the other repeats an id."""
    generator = np.random.default_rng(seed)
    examples = []
    for line in range(1, n_rows + 1):
        start, n_ids = int(generator.integers(97)), int(generator.integers(3, 9))
        prompt = (np.arange(5) + start) % 97
        better, worse = (np.arange(n_ids) + start + 5) % 97, np.full(n_ids + 1, start)
        ids = np.concatenate([prompt, better, prompt, worse]).astype(np.int32)
        parts = (5 + len(better), 5 + len(worse))
        trained = np.concatenate([np.arange(length) >= 5 for length in parts])
        examples.append(Example(line, ids, trained, 1, parts))
    return examples


def rows_of(name: str, n_rows: int) -> list[Example]:
    return make_pairs(n_rows) if name in PAIRS else make_examples(n_rows)


def trainer_of(name: str, *, padded: bool = False, **changes: Any) -> Trainer:
    spec = make_spec(objective=objectives.parse_params({"type": name}).model_dump(), **changes)
    return make_trainer(spec, train=rows_of(name, 8), padded=padded)


def loss_of(trainer: Trainer, examples: Sequence[Example]) -> float:
    task = trainer.task
    batch = task.objective.collate(examples, "cpu")
    return float(task.objective.loss(task.forward, batch, task.objective_params).loss.detach())


class Silent:
    def untrained(self, *_: object) -> None:
        raise AssertionError("there is no validation split")

    def step(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_training_brings_the_loss_down_and_the_hits_up(name: str, padded: bool) -> None:
    trainer = trainer_of(name, padded=padded)
    before = trainer.evaluate(trainer.task.train)
    trainer.run(Silent(), lambda *_: None, lambda: None)
    after = trainer.evaluate(trainer.task.train)
    assert after.mean_loss < before.mean_loss
    assert after.accuracy >= before.accuracy
    assert before.n_trained == sum(each.n_trained for each in trainer.task.train)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "kto"])
def test_packed_and_padded_give_the_same_and_rows_are_judged_one_by_one(name: str) -> None:
    packed, padded = trainer_of(name), trainer_of(name, padded=True)
    for trainer in (packed, padded):
        trainer.task.model.eval()
        _disturb(trainer)
    rows = rows_of(name, 4)
    expected = loss_of(padded, rows)
    assert loss_of(packed, rows) == pytest.approx(expected, rel=1e-4)
    assert sum(loss_of(packed, [row]) for row in rows) == pytest.approx(expected, rel=1e-4)


def _disturb(trainer: Trainer) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_the_reference_is_the_base_whatever_the_adapter_has_learned(padded: bool) -> None:
    trainer = trainer_of("dpo", padded=padded)
    forward, batch = trainer.task.forward, trainer.task.objective.collate(make_pairs(3), "cpu")
    untouched, same = preference.against_base(forward, batch)
    torch.testing.assert_close(untouched, same)
    _disturb(trainer)
    trainer.task.model.train()
    policy, reference = preference.against_base(forward, batch)
    torch.testing.assert_close(reference, same)
    assert not torch.allclose(policy, same, rtol=1e-2)
    assert trainer.task.model.training
    assert all(parameter.requires_grad for parameter in trainer.parameters.values())


def test_the_log_probabilities_are_those_of_a_plain_forward_pass() -> None:
    trainer = trainer_of("dpo")
    trainer.task.model.eval()
    (row,) = make_pairs(1)
    sums, _ = preference.per_sequence(
        trainer.task.forward.log_probs(trainer.task.objective.collate([row], "cpu")),
        trainer.task.objective.collate([row], "cpu"),
    )
    for (start, end), found in zip(
        pairwise([0, row.parts[0], sum(row.parts)]), sums.tolist(), strict=True
    ):
        ids = torch.from_numpy(row.input_ids[start:end].astype("int64"))[None]
        logits = trainer.task.model(input_ids=ids).logits[0].log_softmax(-1).detach()
        expected = sum(float(logits[at - 1, ids[0, at]]) for at in range(5, end - start))
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_lower_learning_rate_is_the_default_of_preferences() -> None:
    spec = make_spec(optimizer={"learning_rate": "auto"})
    sft, dpo = (objectives.get_objective(name).rate_scale for name in ("sft", "dpo"))
    rates = [spec.resolved(8, 10**8, scale).optimizer.learning_rate for scale in (sft, dpo)]
    assert rates == [1e-3, pytest.approx(1e-4)]


def test_the_document_has_every_objective_with_its_rows() -> None:
    document = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text()
    table = {line.split("`")[1]: line for line in document.splitlines() if line.startswith("| `")}
    for name, objective in objectives.all_objectives().items():
        assert all(f"`{form}`" in table[name] for form in objective.forms), name


def make_choices(n_rows: int) -> list[Example]:
    """A prompt of 4 ids, the next number as the right choice, two others as wrong ones."""
    rows = []
    for line in range(1, n_rows + 1):
        start = 7 * line % 80
        prompt = [start, start + 1, start + 2, start + 3]
        choices = [[start + 4, start + 5], [start], [start + 9, 3, 5]]
        ids = np.array([each for choice in choices for each in prompt + choice], np.int32)
        parts = tuple(4 + len(choice) for choice in choices)
        trained = np.concatenate([np.arange(length) >= 4 for length in parts])
        rows.append(Example(line, ids, trained, 1, parts))
    return rows


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_tfew_is_the_sum_of_its_three_losses(padded: bool) -> None:
    rows = make_choices(3)
    found = []
    for given in ({}, {"unlikelihood": False}, {"length_normalised": False}):
        spec = make_spec(objective=objectives.parse_params({"type": "tfew", **given}).model_dump())
        trainer = make_trainer(spec, train=rows, padded=padded)
        trainer.task.model.eval()
        found.append(loss_of(trainer, rows))
    forward, batch = trainer.task.forward, trainer.task.objective.collate(rows, "cpu")
    parts = forward.log_probs(batch).detach().split([2, 1, 3] * 3)
    likely = unlikely = normalised = 0.0
    for at in range(0, 9, 3):
        right, *wrong = parts[at : at + 3]
        likely += float(-right.mean())
        unlikely += float(-torch.cat(wrong).exp().neg().log1p().mean())
        scores = torch.stack([each.mean() for each in parts[at : at + 3]])
        normalised += float(scores.logsumexp(0) - scores[0])
    assert found == pytest.approx(
        [likely + unlikely + normalised, likely + normalised, likely + unlikely], rel=1e-4
    )


def test_tfew_learns_to_choose() -> None:
    spec = make_spec(objective=objectives.parse_params({"type": "tfew"}).model_dump())
    trainer = make_trainer(spec, train=make_choices(8))
    before = trainer.evaluate(trainer.task.train)
    trainer.run(Silent(), lambda *_: None, lambda: None)
    after = trainer.evaluate(trainer.task.train)
    assert after.accuracy > before.accuracy
    assert after.n_trained == 8


def test_a_method_that_trains_the_base_itself_leaves_no_reference() -> None:
    trainer = trainer_of("simpo")
    objective = objectives.get_objective("dpo")
    objective.prepare(trainer.task.model, None)
    base: Any = trainer.task.model.get_base_model()
    base.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(InvalidRequestError, match="compares with the base model"):
        objective.prepare(trainer.task.model, None)
