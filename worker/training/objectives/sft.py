"""Supervised fine-tuning: mean cross-entropy over the trained tokens of an optimizer step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

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

if TYPE_CHECKING:
    from peft import PeftModel


class SftParams(ObjectiveParams):
    """Imitate the assistant's turns."""

    type: Literal["sft"] = "sft"
    neftune_noise_alpha: Annotated[float, Field(ge=0, le=100, strict=True)] = Field(
        0.0,
        description="NEFTune (arXiv 2310.05914): noise on the embeddings in training; 5 is usual.",
    )


@register
class Sft(Objective):
    name: ClassVar[str] = "sft"
    Params: ClassVar[type[ObjectiveParams]] = SftParams
    forms: ClassVar[frozenset[str]] = frozenset({"chat", "completion", "text"})

    def mixes(self, params: Any) -> bool:
        return not params.neftune_noise_alpha

    def prepare(self, model: "PeftModel", params: Any) -> None:
        if params.neftune_noise_alpha:
            from worker.training.noise import add_embedding_noise

            add_embedding_noise(model, params.neftune_noise_alpha)

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
