"""ORPO: imitate the preferred answer and push the odds of the other down, in one stage."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from worker.training.objectives import register
from worker.training.objectives.base import Batch, LanguageForward, LossSum, ObjectiveParams
from worker.training.objectives.dpo import PairObjective


class OrpoParams(ObjectiveParams):
    """Imitate the better answer and avoid the other (arXiv 2403.07691); no reference model."""

    type: Literal["orpo"] = "orpo"
    beta: Annotated[float, Field(gt=0, le=100, strict=True)] = Field(
        0.1, description="Weight of the odds ratio (the paper's λ) beside the imitation."
    )


@register
class Orpo(PairObjective):
    """The imitation is a mean over the tokens of an answer, so long answers weigh no more."""

    name: ClassVar[str] = "orpo"
    Params: ClassVar[type[ObjectiveParams]] = OrpoParams

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        from worker.training.losses import preference

        losses, in_order = preference.orpo(preference.means(forward, batch), params.beta)
        return LossSum(losses.sum(), in_order.sum())
