"""MEFT as a method of a job: what it counts, stores and does where a device is not exact."""

from typing import Any

import pytest
import torch

from models.errors import InvalidRequestError
from tests.worker.training.tiny import attach, make_examples, make_spec, make_trainer, tiny_llama
from worker.training import methods
from worker.training.loop import Trainer
from worker.training.reversible.tuner import stack_of
from worker.training.task import Outcome


def meft(**changes: Any) -> dict[str, Any]:
    return methods.parse_params({"type": "meft", "r": 4, **changes}).model_dump()


def trainer_of(warnings: list[str], **changes: Any) -> Trainer:
    spec = make_spec(peft=meft(**changes))
    return make_trainer(spec, train=make_examples(8), warn=warnings.append)


class Silent:
    def untrained(self, loss: float, accuracy: float, total_steps: int) -> None: ...

    def step(self, metrics: Any, progress: Any, total_steps: int) -> None:
        self.last = metrics


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
def test_a_packed_run_is_exact_and_learns(variant: str) -> None:
    """Rows one after another in a packed pass, whose layout the way back sees as well."""
    warnings: list[str] = []
    trainer = trainer_of(warnings, variant=variant)
    assert not trainer.task.forward.pads
    stack = stack_of(trainer.task.model)
    before = trainer.evaluate(trainer.task.train).mean_loss
    stack.keeps_history = True
    assert trainer.run(Silent(), lambda *_: None, lambda: None) is Outcome.FINISHED
    assert stack.last_plan is not None
    assert stack.last_plan.n_mismatches == 0
    stack.keeps_history = False
    assert trainer.evaluate(trainer.task.train).mean_loss < before
    assert warnings == []


def test_keeping_inputs_trains_the_same_weights() -> None:
    trained = []
    for reversible in (True, False):
        trainer = trainer_of([], reversible=reversible)
        torch.manual_seed(0)
        trainer.run(Silent(), lambda *_: None, lambda: None)
        trained.append(torch.cat([each.flatten() for each in trainer.parameters.values()]))
    assert torch.equal(*trained)


def test_a_device_that_is_not_exact_is_found_before_the_first_step() -> None:
    warnings: list[str] = []
    trainer = trainer_of(warnings)
    stack = stack_of(trainer.task.model)
    calls = iter(range(1_000_000))
    attention: Any = stack.layers[0].base_layer.self_attn
    attention.register_forward_hook(lambda *given: (given[2][0] * (1 + 1e-3 * next(calls)), None))
    trainer.begin(Silent())
    assert stack.keeps_inputs
    [warning] = warnings
    assert "does not repeat its own results" in warning
    assert trainer.step().grad_norm > 0


def test_the_number_of_parameters_leaves_out_what_nothing_reads() -> None:
    model = attach(tiny_llama(num_hidden_layers=3), meft())
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    assert sum(".meft_feed_forward." in name for name in names) == 3 * 4
    assert sum(".meft_coupling." in name for name in names) == 2 * 4


def test_the_stored_configuration_names_the_layers_and_the_activation() -> None:
    model = attach(tiny_llama(), meft(variant="meft2", lambda_bits=3))
    params = methods.parse_params(meft(variant="meft2", lambda_bits=3))
    config = methods.get_method("meft").adapter_config(model, params, "tiny")
    assert config["target_modules"] == ["model.layers.0", "model.layers.1"]
    assert (config["variant"], config["lambda_bits"], config["activation"]) == ("meft2", 3, "silu")


@pytest.mark.parametrize("given", [{"lambda_bits": 8}, {"variant": "meft4"}, {"r": 0}])
def test_bad_parameters_name_the_field(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"peft.{next(iter(given))}"):
        meft(**given)
