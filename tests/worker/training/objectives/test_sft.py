"""The loss of supervised fine-tuning against a plain Hugging Face forward, and its mask."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.worker.training.tiny import attach, lora, make_examples, make_trainer, tiny_llama
from worker.training.objectives.base import Example
from worker.training.objectives.sft import IGNORED, Sft, SftParams, label_logits


def sft_loss(model: Any, examples: list[Example]) -> Any:
    sft = Sft()
    return sft.loss(model, sft.collate(examples, 0, "cpu"), SftParams())


def test_the_loss_is_that_of_a_plain_forward_with_labels() -> None:
    examples = make_examples(5)
    model = attach(tiny_llama(), lora()).eval()
    sums = sft_loss(model, examples)
    batch = Sft().collate(examples, 0, "cpu")
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[:, 1:] = batch.targets[:, :-1]
    expected = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
    ).loss
    mean = sums.loss / sum(example.n_trained for example in examples)
    assert torch.allclose(mean, expected, rtol=1e-6)


def test_padding_changes_no_row() -> None:
    examples = make_examples(5)
    model = attach(tiny_llama(), lora()).eval()
    together = sft_loss(model, examples).loss
    one_by_one = torch.stack([sft_loss(model, [example]).loss for example in examples]).sum()
    assert torch.allclose(together, one_by_one, rtol=1e-5)


def test_logits_are_computed_for_labels_only_and_equal_the_full_ones() -> None:
    model = attach(tiny_llama(), lora()).eval()
    batch = Sft().collate(make_examples(3), 0, "cpu")
    few = label_logits(model, batch)
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    wanted = batch.targets != IGNORED
    assert few.shape[0] == wanted.sum() < wanted.numel()
    assert torch.allclose(few, full[wanted], rtol=1e-5, atol=1e-5)


def test_a_model_that_caps_its_logits_keeps_the_cap() -> None:
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        final_logit_softcapping=0.5,
    )
    model = attach(Gemma2ForCausalLM(config).eval(), lora())
    batch = Sft().collate(make_examples(2), 0, "cpu")
    few = label_logits(model, batch)
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert few.abs().max() <= 0.5
    assert torch.allclose(few, full[batch.targets != IGNORED], rtol=1e-4, atol=1e-5)


def test_accuracy_counts_arg_max_hits_on_trained_tokens() -> None:
    model = attach(tiny_llama(), lora()).eval()
    batch = Sft().collate(make_examples(4), 0, "cpu")
    hits = (label_logits(model, batch).argmax(-1) == batch.targets[batch.targets != IGNORED]).sum()
    assert sft_loss(model, make_examples(4)).n_correct == hits


def test_an_untrained_last_token_cannot_change_the_loss() -> None:
    (example,) = make_examples(1)
    trained = example.trained.copy()
    trained[-1] = False
    ids = example.input_ids.copy()
    ids[-1] = (ids[-1] + 13) % 97
    model = attach(tiny_llama(), lora()).eval()
    before = sft_loss(model, [Example(1, example.input_ids, trained, int(trained.sum()))]).loss
    after = sft_loss(model, [Example(1, ids, trained, int(trained.sum()))]).loss
    assert torch.equal(before, after)


def test_no_gradient_comes_from_a_position_without_a_label() -> None:
    trainer = make_trainer(train=make_examples(1))
    example = trainer.task.train[0]
    base: Any = trainer.task.model.get_base_model()
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        embedded = output.detach().requires_grad_()
        kept.append(embedded)
        return embedded

    handle = base.get_input_embeddings().register_forward_hook(keep)
    sft_loss(trainer.task.model, [example]).loss.backward()
    handle.remove()
    gradient = kept[0].grad
    assert gradient is not None
    # The last id predicts nothing; what comes before the labels does matter to them.
    assert not gradient[0, -1].any()
    assert gradient[0, 0].any()


def test_targets_are_shifted_by_one_and_padding_is_ignored() -> None:
    long = Example(1, np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, True]), 2)
    short = Example(2, np.array([9, 4], np.int32), np.array([False, True]), 1)
    batch = Sft().collate([long, short], 0, "cpu")
    assert batch.targets.tolist() == [
        [IGNORED, 7, 8, IGNORED],
        [4, IGNORED, IGNORED, IGNORED],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_the_head_keeps_no_hook_after_a_failure() -> None:
    model = attach(tiny_llama(), lora())
    batch = Sft().collate(make_examples(1), 0, "cpu")
    batch.input_ids.fill_(10_000)
    head: Any = model.get_base_model()
    head = head.get_output_embeddings()
    with pytest.raises(IndexError):
        label_logits(model, batch)
    assert not head._forward_pre_hooks
