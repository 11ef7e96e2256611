"""Encoders and seq2seq models: every objective on every family, with a head that goes along."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional

from tests.worker.training.encoders import (
    ENCODERS,
    SEQ2SEQ,
    headed_trainer,
    rows_for,
    save_encoder,
)
from worker.base_models import load_model
from worker.heads import Head
from worker.training import checkpoint, methods
from worker.training.model import gives_same_logits
from worker.training.tuners.attach import without_known_warnings

CASES = [
    *((family, name) for family in ENCODERS for name in ("mlm", "classification")),
    *((family, "token_classification") for family in ("bert", "modernbert")),
    *((family, "embedding") for family in ("bert", "roberta")),
    *((family, "seq2seq") for family in SEQ2SEQ),
]
FOR_ENCODERS = sorted(
    name for name, method in methods.all_methods().items() if "encoder" in method.families
)
IDS = torch.tensor([[1, 11, 12, 13, 2]])

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # Of tuners that PEFT does not know by itself; the outputs are compared instead.
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]


class Silent:
    def untrained(self, *_: object) -> None:
        raise AssertionError("there is no validation split")

    def step(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {family: save_encoder(folder / family, family) for family in (*ENCODERS, *SEQ2SEQ)}


def frozen_sum(model: Any) -> dict[str, float]:
    """A number of every frozen tensor that changes with any of its bits."""
    return {
        name: float(parameter.detach().double().abs().sum())
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def answer(model: Any) -> torch.Tensor:
    config = model.get_base_model().config
    more = {"decoder_input_ids": IDS} if config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model.eval()(input_ids=IDS, use_cache=False, **more)
    found: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_learns_and_what_is_stored_is_all_that_plain_peft_needs(
    family: str, name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    trainer = headed_trainer(bases[family], name)
    task = trainer.task
    digest = frozen_sum(task.model)
    before = trainer.evaluate(task.train)
    trainer.run(Silent(), lambda *_: None, lambda: None)
    after = trainer.evaluate(task.train)
    assert after.mean_loss < 0.95 * before.mean_loss
    assert frozen_sum(task.model) == digest
    expected = answer(task.model)
    checkpoint.save(trainer, tmp_path / "saved", "tiny")
    assert gives_same_logits(task.model, tmp_path / "saved" / "adapter")
    # Another seed draws another new head, which the stored one takes the place of.
    head = Head(task.objective.head, task.objective.n_outputs(task.objective_params), seed=99)
    base: Any = load_model(bases[family], precision="fp32", head=head)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved" / "adapter"))
    error = (answer(loaded) - expected).norm() / expected.norm()
    assert float(error) <= 1e-5
    fresh = headed_trainer(bases[family], name)
    checkpoint.restore(fresh, tmp_path / "saved")
    torch.testing.assert_close(answer(fresh.task.model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", FOR_ENCODERS)
def test_every_method_trains_a_classifier_with_its_head(
    method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    peft = {"type": method, **({"r": 8} if method == "miss" else {})}
    trainer = headed_trainer(bases["bert"], "classification", peft=peft, n_epochs=8)
    task = trainer.task
    before = trainer.evaluate(task.train).mean_loss
    trainer.run(Silent(), lambda *_: None, lambda: None)
    assert trainer.evaluate(task.train).mean_loss < before
    expected = answer(task.model)
    checkpoint.save(trainer, tmp_path / "saved", "tiny")
    base: Any = load_model(
        bases["bert"], precision="fp32", head=Head("sequence_classification", 3, seed=99)
    )
    with without_known_warnings():
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved" / "adapter"))
    assert float((answer(loaded) - expected).norm() / expected.norm()) <= 1e-5


def test_the_adapter_says_what_of_the_head_it_has(bases: dict[str, Path], tmp_path: Path) -> None:
    trainer = headed_trainer(bases["roberta"], "classification")
    checkpoint_folder = tmp_path / "saved"
    trainer.step()
    checkpoint.save(trainer, checkpoint_folder, "tiny")
    config = json.loads((checkpoint_folder / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["modules_to_save"] == ["classifier.dense", "classifier.out_proj"]
    tensors = load_file(checkpoint_folder / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.classifier.out_proj.weight"].shape == (3, 32)
    assert not any("classifier" in name and "lora" in name for name in tensors)


@pytest.mark.parametrize(("precision", "held"), [("nf4", "Linear4bit"), ("int8", "Int8Linear")])
def test_a_quantised_encoder_keeps_its_new_head_in_float32(
    bases: dict[str, Path], precision: str, held: str
) -> None:
    trainer = headed_trainer(bases["bert"], "classification", precision=precision, n_epochs=4)
    model: Any = trainer.task.model.get_base_model()
    assert type(model.bert.encoder.layer[0].output.dense.base_layer).__name__ == held
    assert trainer.parameters["base_model.model.classifier.weight"].dtype == torch.float32
    before = trainer.evaluate(trainer.task.train).mean_loss
    trainer.run(Silent(), lambda *_: None, lambda: None)
    assert trainer.evaluate(trainer.task.train).mean_loss < before


def test_rows_together_are_rows_one_by_one(bases: dict[str, Path]) -> None:
    for family, name in (
        ("bert", "classification"),
        ("t5", "seq2seq"),
        ("bert", "token_classification"),
    ):
        trainer = headed_trainer(bases[family], name)
        task = trainer.task
        task.model.eval()

        def loss(rows: list[Any], task: Any = task) -> float:
            batch = task.objective.collate(rows, "cpu")
            return float(
                task.objective.loss(task.forward, batch, task.objective_params).loss.detach()
            )

        rows = rows_for(name, 4)
        assert sum(loss([row]) for row in rows) == pytest.approx(loss(rows), rel=1e-4)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("single", [1.0]), ("multi", [1.0, 0.0, 1.0]), ("regression", [2.5])],
)
def test_classification_losses_are_those_of_the_library(
    problem: str, labels: list[float], bases: dict[str, Path]
) -> None:
    trainer = headed_trainer(bases["bert"], "classification", problem=problem)
    task = trainer.task
    task.model.eval()
    (row,) = rows_for("classification", 1)
    row = replace(row, labels=np.array(labels))
    batch = task.objective.collate([row], "cpu")
    found = task.objective.loss(task.forward, batch, task.objective_params)
    logits = task.model(input_ids=batch.input_ids[None]).logits.detach()
    wanted = torch.tensor([labels])
    if problem == "single":
        expected = functional.cross_entropy(logits, wanted[0].long())
    elif problem == "multi":
        expected = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    else:
        expected = functional.mse_loss(logits, wanted)
    assert float(found.loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_masks_are_drawn_anew_in_training_and_stay_in_evaluation(bases: dict[str, Path]) -> None:
    trainer = headed_trainer(bases["bert"], "mlm")
    first, second = (trainer.evaluate(trainer.task.train) for _ in range(2))
    assert first == second
    task = trainer.task
    losses = set()
    for _ in range(3):
        batch = task.objective.collate(task.train, "cpu")
        losses.add(
            float(task.objective.loss(task.forward, batch, task.objective_params).loss.detach())
        )
    assert len(losses) == 3
