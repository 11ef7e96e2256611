"""SimPO: preference pairs without a reference model, rewards being mean log-probabilities."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from worker.training.objectives import register
from worker.training.objectives.base import Batch, LanguageForward, LossSum, ObjectiveParams
from worker.training.objectives.dpo import PairObjective


class SimpoParams(ObjectiveParams):
    """Prefer one answer to another by a margin (arXiv 2405.14734); no reference model."""

    type: Literal["simpo"] = "simpo"
    beta: Annotated[float, Field(gt=0, le=100, strict=True)] = Field(
        2.0, description="Scale of the rewards, which are mean log-probabilities of a token."
    )
    gamma: Annotated[float, Field(ge=0, le=100, strict=True)] = Field(
        1.0, description="Margin, in rewards, that the preferred answer is to have."
    )


@register
class Simpo(PairObjective):
    """One pass a step: half of the work of DPO."""

    name: ClassVar[str] = "simpo"
    Params: ClassVar[type[ObjectiveParams]] = SimpoParams

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        from worker.training.losses import preference

        losses, in_order = preference.simpo(
            preference.means(forward, batch), params.beta, params.gamma
        )
        return LossSum(losses.sum(), in_order.sum())
