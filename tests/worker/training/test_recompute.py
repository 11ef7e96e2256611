"""Activation checkpointing: the same numbers with less that is kept."""

from typing import Any

import pytest
import torch

from tests.worker.training.tiny import (
    Losses,
    lora,
    make_examples,
    make_spec,
    make_trainer,
    make_trainers_on_one_base,
    tiny_llama,
)
from worker.training import recompute
from worker.training.joint import JointRun, Member
from worker.training.loop import Trainer
from worker.training.task import Outcome

SPEC = make_spec(peft=lora(dropout=0.3))


def kept_bytes(trainer: Trainer) -> int:
    """Return how much a step keeps for its backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.step()
    return sum(kept.values())


@pytest.mark.parametrize("padded", [False, True])
def test_the_run_is_the_same_bit_for_bit(padded: bool) -> None:
    def run(*, again: bool) -> tuple[Losses, dict[str, torch.nn.Parameter]]:
        trainer = make_trainer(SPEC, padded=padded)
        if again:
            recompute.enable(trainer.task.model)
        torch.manual_seed(3)
        losses = Losses()
        trainer.run(losses, lambda *_: None, lambda: None)
        return losses, trainer.parameters

    kept, weights = run(again=False)
    made_again, same = run(again=True)
    assert made_again == kept
    assert all(torch.equal(each, weights[name]) for name, each in same.items())


def test_less_is_kept() -> None:
    trainers = [make_trainer(model=tiny_llama(num_hidden_layers=6)) for _ in range(2)]
    recompute.enable(trainers[1].task.model)
    whole, inputs = (kept_bytes(trainer) for trainer in trainers)
    assert inputs < whole / 2


def test_jobs_that_share_a_pass_keep_their_own_random_numbers() -> None:
    def run(*, again: bool) -> list[Losses]:
        jobs = [(SPEC, make_examples(4, seed=seed)) for seed in (1, 2)]
        trainers = make_trainers_on_one_base(jobs)
        logs = [Losses(), Losses()]
        members = [
            Member(trainer, log, lambda *_: None, lambda: None)
            for trainer, log in zip(trainers, logs, strict=True)
        ]
        if again:
            recompute.enable(trainers[0].task.model)
        assert JointRun(members, shared_tokens=1000).run() == [Outcome.FINISHED] * 2
        return logs

    assert run(again=True) == run(again=False)


class Scarce:
    """An objective that finds no memory until activations are computed again."""

    def __init__(self, trainer: Trainer) -> None:
        self.collate = trainer.task.objective.collate
        self._loss = trainer.task.objective.loss
        self._model = trainer.task.model
        self.sizes: list[int] = []

    def loss(self, forward: Any, batch: Any, params: Any) -> Any:
        if not any(
            getattr(each, "gradient_checkpointing", False) for each in self._model.modules()
        ):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 TB")
        self.sizes.append(len(batch.input_ids))
        return self._loss(forward, batch, params)


def test_a_job_whose_rows_do_not_fit_keeps_no_activations() -> None:
    expected, log = Losses(), Losses()
    make_trainer(SPEC).run(expected, lambda *_: None, lambda: None)
    warnings: list[str] = []
    trainer = make_trainer(SPEC, warn=warnings.append)
    scarce = Scarce(trainer)
    object.__setattr__(trainer.task, "objective", scarce)
    torch.manual_seed(0)
    assert trainer.run(log, lambda *_: None, lambda: None) is Outcome.FINISHED
    assert "activations are computed again" in warnings[-1]
    assert max(scarce.sizes) > 25, "the parts have their first size again"
    assert len(log) == len(expected)


def test_a_model_without_such_layers_is_known() -> None:
    assert recompute.is_possible(tiny_llama())
    assert not recompute.is_possible(torch.nn.Linear(2, 2))
