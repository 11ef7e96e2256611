"""What every method promises, on a small random model of every family it claims."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.worker.training.tiny import (
    SIZES,
    attach,
    digest_of_base,
    make_examples,
    make_spec,
    make_trainer,
)
from worker.base_shape import read_shape
from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.params import LinearShape
from worker.training import checkpoint, methods
from worker.training.loop import Trainer
from worker.training.model import linear_shapes, trainable_parameters
from worker.training.objectives.base import IGNORED

FAMILIES = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "phi", "qwen2", "qwen3")
PRINCIPAL_FAMILIES = ("gpt2", "llama")
"""One with transposed weights, one without: all that a start from the weights depends on."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"r": 4, "dropout": 0.0},
        {"r": 4, "dropout": 0.0, "init": "pissa"},
        {"r": 4, "dropout": 0.0, "init": "olora", "use_rslora": True},
        {"r": 4, "dropout": 0.0, "use_dora": True},
    ],
}
"""What each method is tried with beside its defaults; one that is not named has its defaults."""
CASES = [
    pytest.param({"type": name, **given}, family, id=f"{name}-{given.get('init', '')}-{family}")
    for name in methods.all_methods()
    for given in VARIANTS.get(name, [{}])
    for family in (PRINCIPAL_FAMILIES if "init" in given else FAMILIES)
]
IDS = torch.arange(3, 15)[None]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.parametrize(("peft", "family"), CASES),
]


def tiny_model(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES, initializer_range=0.2)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prepared: PreTrainedModel = model.eval().requires_grad_(False)
    return prepared


def trainer_of(peft: dict[str, Any], model: Any, n_epochs: int = 10) -> Trainer:
    spec = make_spec(
        peft=methods.parse_params(peft).model_dump(),
        hyperparameters={
            "n_epochs": n_epochs,
            "batch_size": 4,
            "learning_rate_multiplier": 1.0,
        },
    )
    return make_trainer(spec, model=model, train=make_examples(4), padded=True)


def train(trainer: Trainer) -> list[float]:
    """Train to the end; return the loss on the rows before and after."""
    before = trainer.evaluate(trainer.task.train).mean_loss
    trainer.run(Silent(), lambda *_: None, lambda: None)
    return [before, trainer.evaluate(trainer.task.train).mean_loss]


class Silent:
    def untrained(self, *_: object) -> None:
        raise AssertionError("there is no validation split")

    def step(self, *_: object) -> None:
        pass


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) <= tolerance


def test_nothing_changes_before_the_first_step(peft: dict[str, Any], family: str) -> None:
    model: Any = tiny_model(family)
    expected = logits(model)
    assert_close(logits(attach(model, peft)), expected)


def test_the_loss_falls_and_the_base_stays(peft: dict[str, Any], family: str) -> None:
    trainer = trainer_of(peft, tiny_model(family))
    digest = digest_of_base(trainer.task.model)
    before, after = train(trainer)
    assert after < 0.8 * before
    assert digest_of_base(trainer.task.model) == digest


def test_what_is_not_trained_on_has_no_gradient(peft: dict[str, Any], family: str) -> None:
    trainer = trainer_of(peft, tiny_model(family))
    batch = trainer.task.objective.collate(trainer.task.train, "cpu")
    batch.targets.fill_(IGNORED)
    sums = trainer.task.objective.loss(trainer.task.forward, batch, trainer.task.objective_params)
    sums.loss.backward()
    gradients = [parameter.grad for parameter in trainer.parameters.values()]
    assert float(sums.loss.detach()) == 0
    assert not any(each.any() for each in gradients if each is not None)


def test_the_number_of_parameters_is_the_one_foretold(
    peft: dict[str, Any], family: str, tmp_path: Path
) -> None:
    model: Any = tiny_model(family)
    model.save_pretrained(tmp_path)
    params = methods.parse_params({**peft, "target_modules": [unique_layer(family)]})
    foretold = methods.get_method(peft["type"]).count_parameters(read_shape(tmp_path), params)
    attached = trainable_parameters(attach(model, params.model_dump()))
    assert foretold == sum(parameter.numel() for parameter in attached.values())


def unique_layer(family: str) -> str:
    """A name that is one layer of each block: the estimate knows layers by their last names."""
    return {"gpt2": "c_attn", "gpt_neox": "dense_h_to_4h", "phi": "fc1"}.get(family, "up_proj")


def test_what_is_saved_gives_the_same_logits_everywhere(
    peft: dict[str, Any], family: str, tmp_path: Path
) -> None:
    """PEFT reads it, the inference server takes it, and merged into the base it is the same."""
    trainer = trainer_of(peft, tiny_model(family), n_epochs=2)
    train(trainer)
    expected = logits(trainer.task.model)
    checkpoint.save(trainer, tmp_path, "tiny")
    base: Any = tiny_model(family)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert_close(logits(loaded), expected)
    shapes = {path: LinearShape(*s) for path, s in linear_shapes(trainer.task.model).items()}
    served = read_adapter(tmp_path / "adapter", "0" * 40, shapes)
    assert len(served.modules) * 2 == len(trainer.parameters)
    merged: Any = copy.deepcopy(loaded).merge_and_unload()
    assert_close(logits(merged), expected)
