"""How a batch goes through a model with another head than a causal one; rows are padded."""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence

from models.domain.training import Precision
from worker.training.forward import PaddedForward, label_logits, loss_of, side_by_side
from worker.training.objectives.base import IGNORED, Batch, LossSum


def headed_forward(
    model: PeftModel, precision: Precision, device: str, pad_id: int
) -> "HeadedForward":
    """Return the forward of an encoder, or of a model that reads one text and writes another."""
    base: Any = model.get_base_model()
    kind = Seq2SeqForward if base.config.is_encoder_decoder else HeadedForward
    return kind(model, precision, device, pad_id)


class HeadedForward(PaddedForward):
    """An encoder: masked language model, classifier, tagger, or none but the backbone."""

    def outputs(self, batch: Batch) -> torch.Tensor:
        """Return float32 logits: [N, C] of each row, or [T, C] of each token, padding left out."""
        inputs = self._inputs(batch)
        with self.autocast():
            logits: torch.Tensor = self._model(**inputs, use_cache=False).logits
        return (logits if logits.dim() == 2 else logits[inputs["attention_mask"].bool()]).float()

    def disagreement(self, batch: Batch, outputs: torch.Tensor) -> torch.Tensor | float:
        """Return what a method adds to the loss where two passes differ; most add nothing."""
        return 0.0

    def pooled(self, batch: Batch) -> torch.Tensor:
        """Return the mean hidden state of each sequence, its special tokens included, [S, D]."""
        inputs = self._inputs(batch)
        with self.autocast():
            hidden = self._model(**inputs, use_cache=False).last_hidden_state
        return mean_pooled(hidden, inputs["attention_mask"])

    @property
    def vocab_size(self) -> int:
        base: Any = self._model.get_base_model()
        return int(base.config.vocab_size)

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        inputs = super()._inputs(batch)
        base: Any = self._model.get_base_model()
        if batch.segments is not None and getattr(base.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = side_by_side(batch.segments, batch.lengths, 0)
        return inputs


class Seq2SeqForward(HeadedForward):
    """Sources and targets take turns in a batch; the decoder reads the target, shifted by one."""

    def cross_entropy(self, batch: Batch) -> LossSum:
        targets = batch.targets[batch.targets != IGNORED]
        with self.autocast():
            return loss_of(self.logits(batch), targets)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits [N, vocabulary] of the N tokens of the targets in order."""
        labels = pad_sequence(
            list(batch.targets.split(batch.lengths))[1::2],
            batch_first=True,
            padding_value=IGNORED,
        )
        base: Any = self._model.get_base_model()
        sources = list(batch.input_ids.split(batch.lengths))[0::2]
        inputs = {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=self._pad_id),
            "attention_mask": pad_sequence(
                [torch.ones_like(each) for each in sources], batch_first=True
            ),
            "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=labels),
        }
        with self.autocast():
            return label_logits(self._model, labels != IGNORED, **inputs)


def mean_pooled(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the hidden states that are no padding, float32 [N, D].

    Args:
        hidden: [N, T, D].
        attention_mask: 1 where there is a token, [N, T].
    """
    weights = attention_mask[:, :, None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)
