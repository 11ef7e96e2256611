"""NEFTune: noise of the paper's size while training, none in evaluation."""

from typing import Any

import pytest
import torch

from tests.worker.training.tiny import lora, make_examples, make_spec, make_trainer
from worker.training.loop import Trainer
from worker.training.objectives.sft import Sft, SftParams

ALPHA = 5.0


def noisy(*, padded: bool = False) -> Trainer:
    objective = {"type": "sft", "neftune_noise_alpha": ALPHA}
    return make_trainer(make_spec(objective=objective, peft=lora()), padded=padded)


def embedded(trainer: Trainer, *, n_rows: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Return what the first layer reads, the lengths of the rows, and the embeddings themselves."""
    seen: list[torch.Tensor] = []
    base: Any = trainer.task.model.get_base_model()
    hook = base.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = Sft().collate(make_examples(n_rows), "cpu")
    trainer.task.objective.loss(trainer.task.forward, batch, SftParams())
    hook.remove()
    return seen[0], batch.lengths, base.get_input_embeddings().weight[batch.input_ids]


def test_each_row_gets_noise_of_its_own_size() -> None:
    trainer = noisy()
    trainer.task.model.train()
    torch.manual_seed(0)
    found, lengths, clean = embedded(trainer, n_rows=4)
    noise = (found[0] - clean).split(lengths)
    for row, length in zip(noise, lengths, strict=True):
        bound = ALPHA / (length * clean.shape[-1]) ** 0.5
        assert 0.9 * bound < float(row.abs().max()) <= bound * 1.0001
        assert float(row.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_padded_pass_is_disturbed_too() -> None:
    trainer = noisy(padded=True)
    trainer.task.model.train()
    found, lengths, clean = embedded(trainer, n_rows=1)
    bound = ALPHA / (lengths[0] * clean.shape[-1]) ** 0.5
    assert 0 < float((found[0] - clean).abs().max()) <= bound * 1.0001


def test_an_evaluation_is_not_disturbed() -> None:
    trainer = noisy()
    trainer.task.model.eval()
    found, _, clean = embedded(trainer, n_rows=2)
    assert torch.equal(found[0], clean)


def test_without_the_setting_there_is_none() -> None:
    trainer = make_trainer()
    trainer.task.model.train()
    found, _, clean = embedded(trainer, n_rows=2)
    assert torch.equal(found[0], clean)
