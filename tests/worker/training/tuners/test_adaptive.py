"""AdaLoRA: the term for orthogonality, the budget of ranks, and a resume in the middle of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import InvalidRequestError
from tests.worker.training.tiny import attach, make_examples, make_spec, make_trainer, tiny_llama
from worker.training import checkpoint, methods
from worker.training.loop import Trainer
from worker.training.tuners.adaptive import add_orthogonality

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def adalora(**changes: Any) -> dict[str, Any]:
    given = {"type": "adalora", "r": 2, "initial_r": 4, "target_modules": ["q_proj", "up_proj"]}
    return methods.parse_params({**given, **changes}).model_dump()


def trainer_of(**changes: Any) -> Trainer:
    numbers = {"n_epochs": 5, "batch_size": 4, "learning_rate_multiplier": 1.0}
    spec = make_spec(peft=adalora(**changes), hyperparameters=numbers)
    return make_trainer(spec, train=make_examples(8), padded=True)


def ranks_of(trainer: Trainer) -> list[int]:
    return [int((e != 0).sum()) for name, e in trainer.parameters.items() if "lora_E" in name]


def test_the_gradient_is_that_of_the_distance_from_orthonormal_directions() -> None:
    model: Any = attach(tiny_llama(), adalora(target_modules=["layers.0.self_attn.q_proj"]))
    module = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    q, p = module.lora_A["default"], module.lora_B["default"]
    p.grad = torch.ones_like(p)
    add_orthogonality(model, 0.5)
    one, other = (each.detach().clone().requires_grad_() for each in (q, p))
    identity = torch.eye(4)
    term = (one @ one.T - identity).norm() + (other.T @ other - identity).norm()
    wanted = torch.autograd.grad(0.5 * term / 2, [one, other])
    torch.testing.assert_close(q.grad, wanted[0])
    torch.testing.assert_close(p.grad, wanted[1] + 1)
    assert module.lora_E["default"].grad is None


def test_the_budget_falls_to_the_ranks_asked_for_and_a_resumed_run_is_the_whole_one(
    tmp_path: Path,
) -> None:
    whole = trainer_of()
    assert whole.total_steps == 10
    sums = []
    for step in range(1, 11):
        whole.step()
        sums.append(sum(ranks_of(whole)))
        if step in (4, 8):  # while the budget falls, and when it has fallen
            checkpoint.save(whole, tmp_path / str(step), "tiny")
    assert sums[0] == 4 * 4  # two layers of each of two names
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] == 4 * 2
    for step in (4, 8):
        again = trainer_of()
        checkpoint.restore(again, tmp_path / str(step))
        while again.progress.step < 10:
            again.step()
        for name, parameter in whole.parameters.items():
            assert torch.equal(again.parameters[name], parameter)


def test_nothing_to_share_out_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="more than r"):
        adalora(r=4)
