"""The loss of supervised fine-tuning against a plain Hugging Face forward, and its mask."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.worker.training.tiny import make_examples, make_trainer
from worker.training.loop import Trainer
from worker.training.objectives.base import IGNORED, Example
from worker.training.objectives.sft import Sft, SftParams


@pytest.fixture(params=[False, True], ids=["packed", "padded"])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    made = make_trainer(padded=request.param)
    made.task.model.eval()
    return made


def sft_loss(trainer: Trainer, examples: list[Example]) -> Any:
    sft = Sft()
    return sft.loss(trainer.task.forward, sft.collate(examples, "cpu"), SftParams())


def plain_loss(model: PeftModel, example: Example) -> float:
    """The sum of the losses of one row, by the library's own shift and mean."""
    ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
    labels = ids.masked_fill(~torch.from_numpy(example.trained)[None], IGNORED)
    return float(model(input_ids=ids, labels=labels).loss.detach()) * example.n_trained


def test_the_loss_is_that_of_a_plain_forward_with_labels(trainer: Trainer) -> None:
    examples = make_examples(5)
    expected = sum(plain_loss(trainer.task.model, example) for example in examples)
    assert float(sft_loss(trainer, examples).loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_rows_together_are_rows_one_by_one(trainer: Trainer) -> None:
    examples = make_examples(5)
    together = sft_loss(trainer, examples).loss
    one_by_one = torch.stack([sft_loss(trainer, [example]).loss for example in examples]).sum()
    assert torch.allclose(together, one_by_one, rtol=1e-5)


def test_an_untrained_last_token_cannot_change_the_loss(trainer: Trainer) -> None:
    (example,) = make_examples(1)
    trained = example.trained.copy()
    trained[-1] = False
    ids = example.input_ids.copy()
    ids[-1] = (ids[-1] + 13) % 97
    before = sft_loss(trainer, [Example(1, example.input_ids, trained, int(trained.sum()))]).loss
    after = sft_loss(trainer, [Example(1, ids, trained, int(trained.sum()))]).loss
    assert torch.equal(before, after)


def test_no_gradient_comes_from_a_position_without_a_label(trainer: Trainer) -> None:
    (example,) = make_examples(1)
    base: Any = trainer.task.model.get_base_model()
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        embedded = output.detach().requires_grad_()
        kept.append(embedded)
        return embedded

    handle = base.get_input_embeddings().register_forward_hook(keep)
    sft_loss(trainer, [example]).loss.backward()
    handle.remove()
    gradient = kept[0].grad
    assert gradient is not None
    # The last id predicts nothing; what comes before the labels does matter to them.
    assert not gradient[0, -1].any()
    assert gradient[0, 0].any()


def test_targets_are_shifted_by_one_and_never_cross_rows() -> None:
    long = Example(1, np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, True]), 2)
    short = Example(2, np.array([9, 4], np.int32), np.array([False, True]), 1)
    batch = Sft().collate([long, short], "cpu")
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.targets.tolist() == [IGNORED, 7, 8, IGNORED, 4, IGNORED]
    assert batch.lengths == [4, 2]
