"""Several jobs over one tiny base: each gives what it gives alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from models.domain.reports import StepMetrics
from models.domain.training import TrainingSpec
from models.errors import LeaseLostError, TrainingFailedError
from tests.worker.training.tiny import (
    lora,
    make_examples,
    make_spec,
    make_trainer,
    make_trainers_on_one_base,
    tiny_llama,
)
from worker.training import checkpoint, joint
from worker.training.joint import JointRun, Member, can_share
from worker.training.loop import Trainer
from worker.training.objectives.base import Example
from worker.training.packed.lora import LinearGroup
from worker.training.task import Outcome, Progress, Stop

Jobs = list[tuple[TrainingSpec, list[Example]]]


class Log:
    """Keeps what a job reports and the steps of its checkpoints."""

    def __init__(self) -> None:
        self.points: list[StepMetrics] = []
        self.saved: list[int] = []

    def untrained(self, *_: Any) -> None:
        return

    def step(self, metrics: StepMetrics, progress: Progress, _: int) -> None:
        assert metrics.step == progress.step
        self.points.append(metrics)

    def save(self, trainer: Trainer, point: StepMetrics) -> None:
        assert trainer.progress.step == point.step
        self.saved.append(point.step)

    @property
    def losses(self) -> list[float]:
        return [point.train_loss for point in self.points]


def never() -> Stop | None:
    return None


def different_jobs(**changes: Any) -> Jobs:
    """Three jobs that differ in data, length, rank, targets, dropout, rate, batch and epochs."""

    def numbers(n_epochs: int, batch_size: int) -> dict[str, Any]:
        return {
            "n_epochs": n_epochs,
            "batch_size": batch_size,
            "learning_rate_multiplier": 1.0,
        }

    return [
        (
            make_spec(peft=lora(dropout=0.2), hyperparameters=numbers(3, 2), **changes),
            make_examples(8),
        ),
        (
            make_spec(
                seed=3,
                peft=lora(r=2, alpha=8.0, target_modules=["q_proj", "down_proj"]),
                hyperparameters=numbers(2, 1),
                optimizer={"learning_rate": 0.02, "schedule": "linear"},
                **changes,
            ),
            make_examples(5, seed=1),
        ),
        (
            make_spec(
                seed=5,
                peft=lora(r=8, dropout=0.1, use_rslora=True, lora_plus_ratio=4.0),
                hyperparameters=numbers(4, 2),
                **changes,
            ),
            make_examples(6, seed=2),
        ),
    ]


def alone(jobs: Jobs, **options: Any) -> list[tuple[Trainer, Log]]:
    done = []
    for spec, train in jobs:
        trainer = make_trainer(spec, train=train, valid=train[:2], **options)
        checkpoint.seed_everything(spec.seed)
        log = Log()
        trainer.run(log, log.save, never)
        done.append((trainer, log))
    return done


def members_of(
    trainers: Sequence[Trainer], asked: dict[int, Callable[[], Stop | None]] | None = None
) -> tuple[list[Member], list[Log]]:
    logs = [Log() for _ in trainers]
    return [
        Member(trainer, log, log.save, (asked or {}).get(index, never))
        for index, (trainer, log) in enumerate(zip(trainers, logs, strict=True))
    ], logs


def require_equal(trainer: Trainer, expected: Trainer, tolerance: float = 5e-4) -> None:
    """Adam makes whole steps of small differences: they move by 0.01 in each of six updates."""
    assert trainer.parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        torch.testing.assert_close(
            trainer.parameters[name], parameter, rtol=tolerance, atol=tolerance
        )


@pytest.fixture(scope="module")
def solo() -> list[tuple[Trainer, Log]]:
    """The different jobs, each trained alone; not to be changed."""
    return alone(different_jobs())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters each training pass through a layer had."""
    counts: list[int] = []
    parts = LinearGroup.parts

    def spy(self: LinearGroup, like: torch.Tensor, *, training: bool) -> Any:
        found = parts(self, like, training=training)
        if training:
            counts.append(len(found[0]))
        return found

    monkeypatch.setattr(LinearGroup, "parts", spy)
    return counts


@pytest.mark.parametrize("token_budget", [None, 30])
def test_jobs_together_give_the_losses_and_adapters_that_each_gives_alone(
    token_budget: int | None, solo: list[tuple[Trainer, Log]], passes: list[int]
) -> None:
    jobs = different_jobs()
    expected = solo if token_budget is None else alone(jobs, token_budget=token_budget)
    passes.clear()
    members, logs = members_of(make_trainers_on_one_base(jobs, token_budget=token_budget))
    assert JointRun(members).run() == [Outcome.FINISHED] * 3
    assert max(passes) == 3
    for _member, log, (_trainer, own) in zip(members, logs, expected, strict=True):
        # Where products of other shapes round otherwise, as on some processors, Adam makes whole
        # steps of these differences later on: close at first, near to the end.
        assert log.losses[:4] == pytest.approx(own.losses[:4], rel=1e-4)
        assert log.losses == pytest.approx(own.losses, rel=0.05)
        for point, twin in zip(log.points, own.points, strict=True):
            assert point.learning_rate == twin.learning_rate
            assert point.tokens == twin.tokens
            assert (point.full_valid_loss is None) == (twin.full_valid_loss is None)
            assert (point.full_valid_loss or 0) == pytest.approx(
                twin.full_valid_loss or 0, rel=0.05
            )
        for point, twin in zip(log.points[:4], own.points[:4], strict=True):
            assert point.grad_norm == pytest.approx(twin.grad_norm, rel=1e-2)
        assert log.saved == own.saved
    weights = [next(iter(member.trainer.parameters.values())) for member in members]
    assert len({weight.shape for weight in weights}) == 3


def test_jobs_together_in_bfloat16_stay_near_what_each_gives_alone() -> None:
    jobs = different_jobs(precision={"type": "bf16"})
    model = tiny_llama(dtype=torch.bfloat16)
    members, logs = members_of(make_trainers_on_one_base(jobs, model))
    assert JointRun(members).run() == [Outcome.FINISHED] * 3
    for log, (spec, train) in zip(logs, jobs, strict=True):
        trainer = make_trainer(
            spec, train=train, valid=train[:2], model=tiny_llama(dtype=torch.bfloat16)
        )
        checkpoint.seed_everything(spec.seed)
        own = Log()
        trainer.run(own, own.save, never)
        # Each alone is as far as this from the same job in float32.
        assert log.losses == pytest.approx(own.losses, abs=0.08)


def test_a_loss_that_is_not_finite_ends_its_job_only(
    solo: list[tuple[Trainer, Log]],
) -> None:
    jobs = different_jobs()
    trainers = make_trainers_on_one_base(jobs)
    name, parameter = next(iter(trainers[1].parameters.items()))
    with torch.no_grad():
        parameter.fill_(float("nan"))
    trainers[1]._validate = lambda step: {}  # type: ignore[method-assign]
    trainers[1].progress.step = 1  # past the scores of the untrained model
    members, _ = members_of(trainers)
    with capture_logs() as lines:
        ends = JointRun(members).run()
    assert isinstance(ends[1], TrainingFailedError), name
    assert ends[1].code == "non_finite_loss"
    assert [line["adapter"] for line in lines if line["event"] == "member_ended"] == ["job1"]
    for index in (0, 2):
        assert ends[index] is Outcome.FINISHED
        require_equal(trainers[index], solo[index][0])


def test_a_lost_lease_and_a_cancel_end_their_jobs_only(
    solo: list[tuple[Trainer, Log]],
) -> None:
    jobs = different_jobs()
    trainers = make_trainers_on_one_base(jobs)

    def cancel() -> Stop | None:
        return Stop.CANCEL if trainers[0].progress.step == 2 else None

    members, logs = members_of(trainers, {0: cancel})

    def lost(trainer: Trainer, _: StepMetrics) -> None:
        raise LeaseLostError(f"lost at step {trainer.progress.step}")

    trainers[1].checkpoint_steps = 3
    members[1].save = lost
    ends = JointRun(members).run()
    assert ends[0] is Outcome.CANCELLED
    assert logs[0].losses == pytest.approx(solo[0][1].losses[:2], rel=1e-5)
    assert isinstance(ends[1], LeaseLostError)
    assert trainers[1].progress.step == 3
    assert ends[2] is Outcome.FINISHED
    require_equal(trainers[2], solo[2][0])


def test_a_drained_job_goes_on_from_its_checkpoint_alone(
    solo: list[tuple[Trainer, Log]], tmp_path: Path
) -> None:
    jobs = different_jobs()
    trainers = make_trainers_on_one_base(jobs)

    def drain() -> Stop | None:
        return Stop.DRAIN if trainers[0].progress.step == 4 else None

    members, _ = members_of(trainers, dict.fromkeys(range(3), drain))
    members[0].save = lambda trainer, _: checkpoint.save(trainer, tmp_path, "tiny")
    assert JointRun(members).run()[0] is Outcome.DRAINED
    spec, train = jobs[0]
    resumed = make_trainer(spec, train=train, valid=train[:2])
    checkpoint.restore(resumed, tmp_path)
    assert resumed.progress.step == 4
    log = Log()
    resumed.run(log, log.save, never)
    assert log.points[0].step == 5
    require_equal(resumed, solo[0][0])


def test_a_job_goes_on_together_from_a_checkpoint_that_it_made_alone(
    solo: list[tuple[Trainer, Log]], tmp_path: Path
) -> None:
    jobs = different_jobs()
    spec, train = jobs[0]
    first = make_trainer(spec, train=train, valid=train[:2])
    checkpoint.seed_everything(spec.seed)
    first.run(
        Log(),
        lambda trainer, _: checkpoint.save(trainer, tmp_path, "tiny"),
        lambda: Stop.DRAIN if first.progress.step == 4 else None,
    )
    trainers = make_trainers_on_one_base(jobs)
    checkpoint.restore(trainers[0], tmp_path)
    members, logs = members_of(trainers)
    log = logs[0]
    members[0] = Member(trainers[0], log, log.save, never, torch.get_rng_state())
    assert JointRun(members).run() == [Outcome.FINISHED] * 3
    assert log.points[0].step == 5
    require_equal(trainers[0], solo[0][0])


def test_large_steps_go_through_the_model_alone(passes: list[int]) -> None:
    members, _ = members_of(make_trainers_on_one_base(different_jobs()))
    assert JointRun(members, shared_tokens=1).run() == [Outcome.FINISHED] * 3
    assert set(passes) <= {0, 1}


def test_where_memory_is_short_jobs_go_on_apart_with_the_same_result(
    solo: list[tuple[Trainer, Log]], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = different_jobs()

    def too_much(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(joint, "_shared_scores", too_much)
    members, _ = members_of(make_trainers_on_one_base(jobs))
    assert JointRun(members).run() == [Outcome.FINISHED] * 3
    for member, (trainer, _) in zip(members, solo, strict=True):
        require_equal(member.trainer, trainer)


def test_noise_on_the_embeddings_and_padded_passes_are_not_shared() -> None:
    noisy = make_spec(objective={"type": "sft", "neftune_noise_alpha": 5.0})
    assert not can_share(make_trainer(noisy).task)
    assert not can_share(make_trainer(padded=True).task)
    assert can_share(make_trainer().task)


def test_members_need_one_model_and_adapters_of_their_own() -> None:
    one, other = make_trainer(), make_trainer()
    with pytest.raises(ValueError, match="different models"):
        JointRun(members_of([one, other])[0])
    with pytest.raises(ValueError, match="adapter of its own"):
        JointRun(members_of([one, one])[0])


@pytest.mark.gpu
def test_jobs_together_on_a_gpu_stay_near_what_each_gives_alone(passes: list[int]) -> None:
    jobs = different_jobs(precision={"type": "bf16"})

    def model() -> Any:
        return tiny_llama(dtype=torch.bfloat16, device="cuda")

    members, logs = members_of(make_trainers_on_one_base(jobs, model()))
    assert JointRun(members).run() == [Outcome.FINISHED] * 3
    assert max(passes) == 3
    for log, (spec, train) in zip(logs, jobs, strict=True):
        trainer = make_trainer(spec, train=train, valid=train[:2], model=model())
        checkpoint.seed_everything(spec.seed)
        own = Log()
        trainer.run(own, own.save, never)
        assert log.losses[:4] == pytest.approx(own.losses[:4], abs=0.02)
        assert log.losses == pytest.approx(own.losses, abs=0.08)
