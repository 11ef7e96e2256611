"""The state of a run as files: exact resume, and files that do not fit."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import TrainingFailedError
from tests.worker.training.tiny import (
    Losses,
    lora,
    make_examples,
    make_spec,
    make_trainer,
    tiny_llama,
)
from worker.training import checkpoint
from worker.training.checkpoint import StateError
from worker.training.loop import Trainer
from worker.training.task import Outcome, Stop

SPEC = make_spec(peft=lora(dropout=0.2), optimizer={"learning_rate": 0.01, "weight_decay": 0.1})


@pytest.fixture(params=[1.0, 16.0], ids=["one rate", "two rates"], autouse=True)
def spec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with one group of parameters, and with LoRA+ and its two."""
    peft = SPEC.peft | {"lora_plus_ratio": request.param}
    monkeypatch.setattr(f"{__name__}.SPEC", SPEC.model_copy(update={"peft": peft}))


def new_trainer() -> Trainer:
    return make_trainer(SPEC, valid=make_examples(4, seed=1))


def train(
    trainer: Trainer, save: Callable[..., None] = lambda *_: None, stop_at: int = 99
) -> Losses:
    losses = Losses()
    trainer.run(losses, save, lambda: Stop.DRAIN if trainer.progress.step == stop_at else None)
    return losses


def interrupted_at(step: int, directory: Path) -> Losses:
    """Run to `step` from a fresh start, save there, and return the losses so far."""
    checkpoint.seed_everything(SPEC.seed)
    return train(
        new_trainer(), lambda trainer, _: checkpoint.save(trainer, directory, "tiny"), step
    )


def whole_run() -> tuple[Losses, dict[str, torch.Tensor]]:
    checkpoint.seed_everything(SPEC.seed)
    trainer = new_trainer()
    return train(trainer), checkpoint.published_tensors(trainer)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(step: int, tmp_path: Path) -> None:
    expected, weights = whole_run()
    before = interrupted_at(step, tmp_path / "state")
    torch.manual_seed(99)  # another process starts with another state
    resumed = new_trainer()
    checkpoint.restore(resumed, tmp_path / "state")
    after = train(resumed)
    assert before + after == expected
    for name, tensor in checkpoint.published_tensors(resumed).items():
        assert torch.equal(tensor, weights[name])


def test_dropout_does_take_part_in_that(tmp_path: Path) -> None:
    expected, _ = whole_run()
    interrupted_at(3, tmp_path / "state")
    resumed = new_trainer()
    checkpoint.restore(resumed, tmp_path / "state")
    torch.manual_seed(99)
    assert train(resumed) != expected[3:]


def test_the_state_of_the_last_step_leaves_nothing_to_do(tmp_path: Path) -> None:
    checkpoint.seed_everything(SPEC.seed)
    train(new_trainer(), lambda trainer, _: checkpoint.save(trainer, tmp_path / "s", "tiny"))
    resumed = new_trainer()
    checkpoint.restore(resumed, tmp_path / "s")
    losses = Losses()
    assert resumed.run(losses, lambda *_: None, lambda: None) is Outcome.FINISHED
    assert losses == []


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    interrupted_at(2, tmp_path / "state")
    trainer = new_trainer()
    checkpoint.restore(trainer, tmp_path / "state")
    drawn = (random.gauss(0, 1), np.random.standard_normal(), torch.rand(1).item())
    checkpoint.seed_everything(123)
    checkpoint.restore(trainer, tmp_path / "state")
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.rand(1).item()) == drawn


def test_progress_of_early_stopping_is_kept(tmp_path: Path) -> None:
    trainer = new_trainer()
    train(trainer, stop_at=2)
    trainer.progress.best_valid_loss = 1.5
    trainer.progress.n_without_improvement = 2
    checkpoint.save(trainer, tmp_path / "state", "tiny")
    resumed = new_trainer()
    checkpoint.restore(resumed, tmp_path / "state")
    assert resumed.progress == trainer.progress


def test_nothing_is_pickled_and_no_path_is_written(tmp_path: Path) -> None:
    interrupted_at(2, tmp_path / "state")
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert [str(path) for path in files] == [
        "state/adapter/adapter_config.json",
        "state/adapter/adapter_model.safetensors",
        "state/state/optimizer.safetensors",
        "state/state/rng.safetensors",
        "state/state/trainer.json",
    ]
    for file in files:
        assert str(tmp_path).encode() not in (tmp_path / file).read_bytes()
    kept = json.loads((tmp_path / "state/state/trainer.json").read_text())
    assert (kept["step"], kept["epoch"], kept["batch"]) == (2, 1, 0)


def _drop_file(root: Path) -> None:
    (root / "state" / "rng.safetensors").unlink()


def _cut_file(root: Path) -> None:
    path = root / "state" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _drop_tensor(root: Path) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def _reshape_tensor(root: Path) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, path)


def _later_step(root: Path) -> None:
    path = root / "state" / "trainer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 1000}))


def _broken_json(root: Path) -> None:
    (root / "state" / "trainer.json").write_text("{")


@pytest.mark.parametrize(
    "spoil", [_drop_file, _cut_file, _drop_tensor, _reshape_tensor, _later_step, _broken_json]
)
def test_files_that_do_not_fit_change_nothing(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    interrupted_at(2, tmp_path / "state")
    spoil(tmp_path / "state")
    trainer = new_trainer()
    before = checkpoint.published_tensors(trainer)
    with pytest.raises(StateError):
        checkpoint.restore(trainer, tmp_path / "state")
    assert trainer.progress.step == 0
    assert all(torch.equal(t, before[n]) for n, t in checkpoint.published_tensors(trainer).items())


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1024**2))
    with pytest.raises(TrainingFailedError, match="1,048,576 bytes free") as caught:
        checkpoint.save(new_trainer(), tmp_path / "state", "tiny")
    assert caught.value.code == "storage_full"
    assert not list((tmp_path / "state").iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"]
)
def test_on_a_gpu_a_resumed_run_goes_on_as_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    spec = SPEC.model_copy(
        update={
            "precision": SPEC.precision.model_copy(update={"type": "bf16"}),
            "optimizer": SPEC.optimizer.model_copy(update={"type": kind}),
        }
    )

    def trainer() -> Trainer:
        model = tiny_llama(dtype=torch.bfloat16, device="cuda")
        return make_trainer(spec, model=model, valid=make_examples(4, seed=1))

    checkpoint.seed_everything(spec.seed)
    expected = train(trainer())
    checkpoint.seed_everything(spec.seed)
    before = train(trainer(), lambda own, _: checkpoint.save(own, tmp_path / "state", "tiny"), 3)
    torch.manual_seed(99)
    resumed = trainer()
    checkpoint.restore(resumed, tmp_path / "state")
    # The flash kernel adds up in whatever order its blocks end.
    assert before + train(resumed) == pytest.approx(expected, rel=2e-2)
