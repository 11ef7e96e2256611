"""KTO: answers are desirable or not; a value function of gains and losses against the base."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from worker.training.objectives import register
from worker.training.objectives.base import Batch, LanguageForward, LossSum, ObjectiveParams
from worker.training.objectives.dpo import ReferencedObjective


class KtoParams(ObjectiveParams):
    """Gain on good answers, avoid bad ones (arXiv 2402.01306); the reference is the base model."""

    type: Literal["kto"] = "kto"
    beta: Annotated[float, Field(gt=0, le=2, strict=True)] = Field(
        0.1, description="How strongly the model is tied to the base: lower lets it move further."
    )


@register
class Kto(ReferencedObjective):
    """The reference point is estimated from the pairs that go through the model together."""

    name: ClassVar[str] = "kto"
    Params: ClassVar[type[ObjectiveParams]] = KtoParams

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        from worker.training.losses import preference

        policy, reference = preference.against_base(forward, batch)
        losses, in_order = preference.kto(policy, reference, params.beta)
        return LossSum(losses.sum(), in_order.sum())
