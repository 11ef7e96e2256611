"""The training loop on tiny float32 models, where numbers can be compared exactly."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.domain.reports import StepMetrics
from models.errors import InvalidRequestError, LeaseLostError, TrainingFailedError
from tests.worker.training.tiny import (
    lora,
    make_examples,
    make_spec,
    make_trainer,
    tiny_llama,
)
from worker.training.batches import epoch_batches
from worker.training.loop import Trainer
from worker.training.task import Outcome, Progress, Stop


class Log:
    """Keeps what the loop reports and when it saves."""

    def __init__(self) -> None:
        self.points: list[StepMetrics] = []
        self.saved: list[int] = []
        self.totals: set[int] = set()

    def untrained(self, *_: Any) -> None:
        return

    def step(self, metrics: StepMetrics, progress: Progress, total_steps: int) -> None:
        assert metrics.step == progress.step
        self.points.append(metrics)
        self.totals.add(total_steps)

    def save(self, trainer: Trainer, point: StepMetrics) -> None:
        assert trainer.progress.step == point.step
        self.saved.append(point.step)


def train(trainer: Trainer, asked: Callable[[], Stop | None] = lambda: None) -> tuple[Outcome, Log]:
    log = Log()
    return trainer.run(log, log.save, asked), log


def numbers(**changes: Any) -> dict[str, Any]:
    return {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0, **changes}


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer._sums(trainer.task.train, backward=True)
    return {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


def test_the_loss_falls_and_every_step_is_reported() -> None:
    outcome, log = train(make_trainer(make_spec(hyperparameters=numbers(n_epochs=10))))
    assert outcome is Outcome.FINISHED
    assert [point.step for point in log.points] == list(range(1, 21))
    assert log.totals == {20}
    assert log.points[-1].train_loss < 0.5 * log.points[0].train_loss
    assert log.points[-1].train_mean_token_accuracy > log.points[0].train_mean_token_accuracy
    assert log.points[-1].epoch == 10.0


def test_a_step_counts_its_tokens() -> None:
    trainer = make_trainer()
    _, log = train(trainer)
    rows = trainer.task.train
    per_epoch = sum(len(row.input_ids) for row in rows)
    assert sum(point.tokens for point in log.points[:2]) == per_epoch
    assert sum(p.trained_tokens for p in log.points[:2]) == sum(row.n_trained for row in rows)
    assert trainer.progress.n_tokens == 3 * per_epoch


def test_micro_batches_do_not_change_the_gradient() -> None:
    whole = gradients(make_trainer())
    parts = gradients(make_trainer(token_budget=50))
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], rtol=1e-5, atol=1e-6)
        assert "lora_A" in name or gradient.any()


def test_the_loss_is_a_mean_over_tokens_and_not_over_rows_or_micro_batches() -> None:
    examples = make_examples(4)
    trainer = make_trainer(train=examples, token_budget=1)
    scores = [trainer.evaluate([example]) for example in examples]
    expected = sum(score.loss for score in scores) / sum(e.n_trained for e in examples)
    _, log = train(make_trainer(train=examples))
    assert log.points[0].train_loss == pytest.approx(expected, rel=1e-6)


def test_the_gradient_norm_is_clipped() -> None:
    trainer = make_trainer(
        make_spec(optimizer={"learning_rate": 1e-3, "max_grad_norm": 0.01, "warmup_ratio": 0.0})
    )
    norms: list[float] = []
    step = trainer.optimizer.step

    def spy(*args: Any, **options: Any) -> Any:
        grads = [p.grad for p in trainer.parameters.values() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(*args, **options)

    trainer.optimizer.step = spy  # type: ignore[method-assign]
    _, log = train(trainer)
    assert log.points[0].grad_norm > 0.01
    assert max(norms) <= 0.01 * 1.0001


def test_the_learning_rate_follows_the_schedule() -> None:
    spec = make_spec(optimizer={"learning_rate": 0.01, "warmup_ratio": 0.34, "schedule": "linear"})
    _, log = train(make_trainer(spec))
    rates = [point.learning_rate for point in log.points]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_two_runs_with_one_seed_are_equal_bit_for_bit() -> None:
    spec = make_spec(peft=lora(dropout=0.2))

    def one() -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        trainer = make_trainer(spec)
        _, log = train(trainer)
        return [p.train_loss for p in log.points], trainer.parameters  # type: ignore[return-value]

    losses, weights = one()
    again, same = one()
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_validation_comes_in_small_and_in_full() -> None:
    valid = make_examples(9, seed=1)
    trainer = make_trainer(make_spec(hyperparameters=numbers(batch_size=2)), valid=valid)
    _, log = train(trainer)
    assert all(point.valid_loss is not None for point in log.points)
    full = [point.step for point in log.points if point.full_valid_loss is not None]
    assert full == [4, 8, 12]
    last = trainer.evaluate(valid)
    assert log.points[-1].full_valid_loss == last.mean_loss
    assert log.points[-1].full_valid_mean_token_accuracy == last.accuracy


def test_validation_is_rare_in_a_long_epoch() -> None:
    spec = make_spec(hyperparameters=numbers(n_epochs=1, batch_size=1))
    _, log = train(make_trainer(spec, train=make_examples(20), valid=make_examples(2, seed=1)))
    assert [p.step for p in log.points if p.valid_loss is not None] == list(range(2, 21, 2))


def test_validation_changes_nothing_in_training() -> None:
    spec = make_spec(peft=lora(dropout=0.2))
    traces = []
    for valid in ([], make_examples(5, seed=1)):
        torch.manual_seed(0)
        _, log = train(make_trainer(spec, valid=valid))
        traces.append([point.train_loss for point in log.points])
    assert traces[0] == traces[1]


def test_training_stops_when_validation_no_longer_improves() -> None:
    spec = make_spec(
        hyperparameters=numbers(n_epochs=20),
        optimizer={"learning_rate": 1e-3},
        early_stopping={"patience": 2, "min_delta": 100.0},
    )
    trainer = make_trainer(spec, valid=make_examples(4, seed=1))
    outcome, log = train(trainer)
    # The first epoch is the best by definition; two more without an improvement of 100 end it.
    assert outcome is Outcome.FINISHED
    assert len(log.points) == 3 * 2
    assert trainer.progress.stopped_early
    assert log.saved == [2, 4, 6]  # all that was judged, since the best may be any


def test_training_goes_on_while_validation_improves() -> None:
    spec = make_spec(early_stopping={"patience": 1})
    trainer = make_trainer(spec, valid=make_examples(8))
    _, log = train(trainer)
    assert len(log.points) == 6
    assert not trainer.progress.stopped_early


def test_early_stopping_without_validation_rows_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="needs a validation_file") as caught:
        make_trainer(make_spec(early_stopping={}))
    assert caught.value.param == "early_stopping"


def test_a_loss_that_is_no_number_ends_the_job_and_names_step_and_rows() -> None:
    trainer = make_trainer()
    loss = trainer.task.objective.loss

    class Broken:
        collate = staticmethod(trainer.task.objective.collate)
        n_calls = 0

        def loss(self, *args: Any) -> Any:
            self.n_calls += 1
            sums = loss(*args)
            factor = math.nan if self.n_calls == 3 else 1.0  # the first is the probe
            return type(sums)(sums.loss * factor, sums.n_correct)

    object.__setattr__(trainer.task, "objective", Broken())
    with pytest.raises(TrainingFailedError, match="The loss of step 2 is nan") as caught:
        train(trainer)
    assert caught.value.code == "non_finite_loss"
    rows = epoch_batches([len(e.input_ids) for e in trainer.task.train], 4, 7, 0)[1]
    lines = ", ".join(str(trainer.task.train[row].line) for row in rows)
    assert f"lines {lines} of" in caught.value.message


def test_an_infinite_gradient_ends_the_job_before_it_reaches_the_weights() -> None:
    trainer = make_trainer()
    train_step = trainer.step
    train_step()
    name, parameter = next(iter(trainer.parameters.items()))
    before = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingFailedError, match="gradient norm of step 2") as caught:
        train_step()
    assert caught.value.code == "non_finite_loss"
    assert torch.equal(parameter, before), name


def test_a_part_without_gradient_is_found_in_the_first_step() -> None:
    trainer = make_trainer()
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    trainer.parameters[name].register_hook(torch.zeros_like)
    with pytest.raises(TrainingFailedError, match=r"layers\.1\.mlp\.up_proj\.lora_B") as caught:
        train(trainer)
    assert caught.value.code == "no_gradient"


def test_a_checkpoint_is_due_every_so_many_steps_and_at_the_end() -> None:
    _, log = train(make_trainer(make_spec(checkpoint_steps=4)))
    assert log.saved == [4, 6]


def test_draining_saves_the_step_it_stands_at() -> None:
    log = Log()
    trainer = make_trainer()
    outcome = trainer.run(log, log.save, lambda: Stop.DRAIN if len(log.points) == 3 else None)
    assert outcome is Outcome.DRAINED
    assert log.saved == [3]


def test_draining_before_the_first_step_saves_nothing() -> None:
    outcome, log = train(make_trainer(), lambda: Stop.DRAIN)
    assert (outcome, log.saved, log.points) == (Outcome.DRAINED, [], [])


def test_draining_at_a_checkpoint_saves_it_once() -> None:
    log = Log()
    trainer = make_trainer(make_spec(checkpoint_steps=2))
    trainer.run(log, log.save, lambda: Stop.DRAIN if len(log.points) == 2 else None)
    assert log.saved == [2]


def test_cancelling_saves_nothing_even_after_the_last_step() -> None:
    log = Log()
    trainer = make_trainer()
    outcome = trainer.run(log, log.save, lambda: Stop.CANCEL if len(log.points) == 2 else None)
    assert (outcome, log.saved) == (Outcome.CANCELLED, [])
    log = Log()
    outcome = make_trainer().run(
        log, log.save, lambda: Stop.CANCEL if len(log.points) == 6 else None
    )
    assert outcome is Outcome.CANCELLED


def test_what_the_reporter_raises_ends_the_run() -> None:
    class Lost:
        def untrained(self, *_: Any) -> None:
            return

        def step(self, *_: Any) -> None:
            raise LeaseLostError("lost")

    trainer = make_trainer(model=tiny_llama())
    with pytest.raises(LeaseLostError):
        trainer.run(Lost(), lambda *_: None, lambda: None)
    assert trainer.progress.step == 1


def test_with_lora_plus_b_learns_so_many_times_as_fast() -> None:
    def first_updates(ratio: float) -> dict[str, float]:
        spec = make_spec(
            peft=lora(lora_plus_ratio=ratio),
            optimizer={"learning_rate": 0.001, "schedule": "constant", "warmup_ratio": 0.0},
        )
        trainer = make_trainer(spec)
        before = {name: each.detach().clone() for name, each in trainer.parameters.items()}
        for _ in range(2):  # A has no gradient as long as B is 0
            trainer.step()
        return {
            name: float((each.detach() - before[name]).abs().max())
            for name, each in trainer.parameters.items()
        }

    plain, plus = first_updates(1.0), first_updates(16.0)
    for name, change in plain.items():
        factor = 16 if ".lora_B." in name else 1
        assert plus[name] == pytest.approx(factor * change, rel=0.2), name


class Scarce:
    """An objective that finds no memory for more than `most` tokens at a time."""

    def __init__(self, objective: Any, most: int) -> None:
        self.collate = objective.collate
        self._loss = objective.loss
        self._most = most
        self.sizes: list[int] = []

    def loss(self, forward: Any, batch: Any, params: Any) -> Any:
        n_tokens = len(batch.input_ids)
        if n_tokens > self._most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 TB")
        self.sizes.append(n_tokens)
        return self._loss(forward, batch, params)


@pytest.mark.parametrize("padded", [False, True])
def test_a_job_that_runs_out_of_memory_goes_on_in_smaller_parts(padded: bool) -> None:
    def run(most: int) -> tuple[Log, list[str], Scarce]:
        warnings: list[str] = []
        trainer = make_trainer(warn=warnings.append, padded=padded)
        scarce = Scarce(trainer.task.objective, most)
        object.__setattr__(trainer.task, "objective", scarce)
        outcome, log = train(trainer)
        assert outcome is Outcome.FINISHED
        return log, warnings, scarce

    plenty, silence, _ = run(10_000)
    little, warnings, scarce = run(30)
    assert silence == []
    assert warnings
    assert all("Memory ran out" in warning for warning in warnings)
    assert max(scarce.sizes) <= 30
    assert [point.tokens for point in little.points] == [point.tokens for point in plenty.points]
    for one, other in zip(little.points, plenty.points, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)


def test_a_row_that_does_not_fit_by_itself_ends_the_job() -> None:
    trainer = make_trainer()
    object.__setattr__(trainer.task, "objective", Scarce(trainer.task.objective, 3))
    with pytest.raises(RuntimeError, match="can't allocate"):
        train(trainer)


def test_the_probe_of_memory_leaves_no_trace() -> None:
    trainer, other = (make_trainer(make_spec(peft=lora(dropout=0.3))) for _ in range(2))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trainer._probe_memory()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.parameters.values())
    torch.manual_seed(5)
    first = trainer.step()
    torch.manual_seed(5)
    second = other.step()
    assert first.train_loss == second.train_loss
    assert first.grad_norm == second.grad_norm
