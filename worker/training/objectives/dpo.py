"""Direct preference optimisation: the better answer gains on the base model, the other loses."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from models.errors import InvalidRequestError
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

    from worker.chat import ChatRenderer
    from worker.training.batches import Renderer


class DpoParams(ObjectiveParams):
    """Prefer one answer to another (arXiv 2305.18290); the reference is the base model."""

    type: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0, le=2, strict=True)] = Field(
        0.1, description="How strongly the model is tied to the base: lower lets it move further."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, strict=True)] = Field(
        0.0, description="Share of pairs that may be labelled the wrong way round."
    )


class PairObjective(Objective):
    """What losses over pairs of answers have in common; accuracy is the share in order."""

    forms: ClassVar[frozenset[str]] = frozenset({"preference"})
    rate_scale: ClassVar[float] = 0.1

    def encoding(self, params: Any) -> str:
        return "pairs"

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        from worker.encode.pairs import PairRenderer

        return PairRenderer(chat)


class ReferencedObjective(PairObjective):
    """One whose reference is the base model: the adapter must be all that is trained."""

    def prepare(self, model: "PeftModel", params: Any) -> None:
        """Raise `InvalidRequestError` if switching the adapter off would not give the base back."""
        adapter = model.active_adapter
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and adapter not in name.split("."):
                raise InvalidRequestError(
                    f"Objective '{self.name}' compares with the base model, but this method trains "
                    f"the base's own {name}. Choose method 'lora', or objective 'simpo' or 'orpo'.",
                    param="objective.type",
                    code="objective_not_for_method",
                )


@register
class Dpo(ReferencedObjective):
    """Sums over pairs: a pair counts once, however long its answers are."""

    name: ClassVar[str] = "dpo"
    Params: ClassVar[type[ObjectiveParams]] = DpoParams

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        from worker.training.losses import preference

        policy, reference = preference.against_base(forward, batch)
        losses, in_order = preference.dpo(policy, reference, params.beta, params.label_smoothing)
        return LossSum(losses.sum(), in_order.sum())
