"""Supervised fine-tuning: mean cross-entropy over the trained tokens of an optimizer step."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from worker.training.objectives import register
from worker.training.objectives.base import (
    Batch,
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

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        return forward.cross_entropy(batch)
