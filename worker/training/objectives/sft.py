"""Supervised fine-tuning: mean cross-entropy over the trained tokens of an optimizer step."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from worker.training.objectives import register
from worker.training.objectives.base import (
    IGNORED,
    Batch,
    Example,
    LanguageForward,
    LossSum,
    Objective,
    ObjectiveParams,
)


class SftParams(ObjectiveParams):
    """Imitate the assistant's turns."""

    type: Literal["sft"] = "sft"


@register
class Sft(Objective):
    name: ClassVar[str] = "sft"
    Params: ClassVar[type[ObjectiveParams]] = SftParams
    forms: ClassVar[frozenset[str]] = frozenset({"chat", "completion", "text"})

    def collate(self, examples: Sequence[Example], device: str) -> Batch:
        import numpy as np
        import torch

        input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
        trained = np.concatenate([example.trained for example in examples])
        # The position before a trained token predicts it; an example's first is never trained.
        targets = np.full_like(input_ids, IGNORED)
        targets[:-1] = np.where(trained[1:], input_ids[1:], IGNORED)
        return Batch(
            torch.from_numpy(input_ids).to(device),
            torch.from_numpy(targets).to(device),
            [len(example.input_ids) for example in examples],
        )

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        return forward.cross_entropy(batch)
