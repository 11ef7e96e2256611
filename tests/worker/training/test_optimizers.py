"""Every optimizer trains, and goes on from its saved state bit for bit."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from models.domain.training import Optimizer
from tests.worker.training.tiny import Losses, make_spec, make_trainer
from worker.training import checkpoint, optimizers
from worker.training.checkpoint import StateError
from worker.training.loop import Trainer
from worker.training.task import Stop

TYPES = get_args(Optimizer.model_fields["type"].annotation)


def trainer_with(kind: str) -> Trainer:
    spec = make_spec(optimizer={"type": kind, "learning_rate": 0.01})
    # Of rank 64, so that some tensors are large enough for 8-bit states.
    wide = spec.model_copy(update={"peft": {**spec.peft, "r": 64}})
    checkpoint.seed_everything(wide.seed)
    return make_trainer(wide)


def train(trainer: Trainer, stop_at: int = 99, save: Any = lambda *_: None) -> Losses:
    losses = Losses()
    trainer.run(losses, save, lambda: Stop.DRAIN if trainer.progress.step == stop_at else None)
    return losses


@pytest.mark.parametrize("kind", TYPES)
def test_the_loss_falls_and_a_resumed_run_is_the_whole_one(kind: str, tmp_path: Path) -> None:
    whole = trainer_with(kind)
    expected = train(whole)
    assert expected[-1] < 0.9 * expected[0]
    before = train(
        trainer_with(kind), 3, lambda each, _: checkpoint.save(each, tmp_path / "s", "tiny")
    )
    resumed = trainer_with(kind)
    checkpoint.restore(resumed, tmp_path / "s")
    assert before + train(resumed) == expected
    weights = checkpoint.published_tensors(resumed)
    assert all(
        torch.equal(each, weights[name])
        for name, each in checkpoint.published_tensors(whole).items()
    )


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "adamw"])
def test_the_state_of_another_optimizer_is_refused(kind: str, tmp_path: Path) -> None:
    train(trainer_with(kind), 1, lambda each, _: checkpoint.save(each, tmp_path / "s", "tiny"))
    with pytest.raises(StateError, match="has not the state of adamw"):
        checkpoint.restore(trainer_with("adamw"), tmp_path / "s")


def test_eight_bit_states_take_about_a_quarter() -> None:
    sizes = {}
    for kind in ("adamw", "adamw_8bit"):
        parameter = torch.nn.Parameter(torch.randn(512, 512))
        parameter.grad = torch.randn_like(parameter)
        optimizer = optimizers.build(Optimizer(type=kind), [{"params": [parameter]}], 0.01)
        optimizer.step()
        states = optimizers.state_tensors(optimizer, parameter)
        sizes[kind] = sum(each.nbytes for each in states.values()) / parameter.numel()
    assert sizes["adamw"] == pytest.approx(8, rel=0.01)
    assert sizes["adamw_8bit"] == pytest.approx(2 + 8 / 256, rel=0.01)


def test_adamw_takes_the_published_step() -> None:
    """Algorithm 2 of arXiv 1711.05101 after one step: −η·(sign of the gradient + λ·θ)."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    parameter.grad = torch.tensor([0.5, -3.0])
    spec = Optimizer(weight_decay=0.1)
    optimizers.build(spec, [{"params": [parameter]}], 0.01).step()
    expected = torch.tensor([1.0 - 0.01 * (1 + 0.1), -2.0 + 0.01 * (1 + 0.2)])
    assert torch.allclose(parameter.detach(), expected, atol=1e-6)


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(ValueError, match="other parameters"):
        optimizers.require_states("adamw", {"a": torch.Size([1])}, {})
