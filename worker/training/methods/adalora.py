"""AdaLoRA (arXiv 2303.10512): ranks go to the layers where they matter.

Every layer begins with more ranks than it is to have on average; while it trains, those that matter
least over all layers are set to 0.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.domain.base import JsonObject
from models.domain.estimates import LayerShape
from worker.training.methods import register
from worker.training.methods.base import MethodParams
from worker.training.methods.peft_tuners import Rank, Strength, TargetedParams, Tuner

if TYPE_CHECKING:
    import torch

    from worker.training.task import Task


class AdaloraParams(TargetedParams):
    """Low-rank matrices whose ranks are shared out between the layers."""

    type: Literal["adalora"] = "adalora"
    r: Rank = Field(8, description="Rank of a layer in the end, the mean over all layers.")
    initial_r: Rank = Field(12, description="Rank of every layer at first; more than r.")
    alpha: Strength = Field(
        32.0, description="Strength: the change is scaled by alpha / initial_r."
    )
    orthogonality: Annotated[float, Field(ge=0, le=100, strict=True)] = Field(
        0.5, description="Weight of the term that keeps directions orthogonal."
    )

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.r >= self.initial_r:
            raise ValueError("initial_r must be more than r, or there is nothing to share out")
        return self


@register
class Adalora(Tuner):
    """Through peft, whose allocator runs after each update."""

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    when: ClassVar[str] = "Where memory for ranks is short and steps are many; LoRA is simpler."
    Params: ClassVar[type[MethodParams]] = AdaloraParams
    config_class: ClassVar[str] = "AdaLoraConfig"
    first: ClassVar[str] = ".lora_E"
    takes_transposed: ClassVar[bool] = True

    def settings(self, params: Any) -> JsonObject:
        return {
            "init_r": params.initial_r,
            "target_r": params.r,
            "lora_alpha": params.alpha,
            "total_step": 1,  # PEFT wants a number; a run's own comes with its first step
        }

    def count_layer(self, layer: LayerShape, params: Any) -> int:
        """Return initial_r · (inputs + outputs + 1): P, Q and the diagonal of Λ."""
        return int(params.initial_r) * (layer.inputs + layer.outputs + 1)

    def before_update(self, task: "Task") -> None:
        from worker.training.tuners.adaptive import add_orthogonality

        params: Any = task.method_params
        if params.orthogonality:
            add_orthogonality(task.model, params.orthogonality)

    def after_update(self, task: "Task", step: int, total_steps: int) -> None:
        from worker.training.tuners.adaptive import allocate

        allocate(task.model, step, total_steps)

    def kept(self, task: "Task") -> "dict[str, torch.Tensor]":
        from worker.training.tuners.adaptive import kept

        return kept(task.model)

    def put_back(self, task: "Task", states: "dict[str, torch.Tensor]") -> None:
        from worker.training.tuners.adaptive import put_back

        put_back(task.model, states)

    def decays(self, parameter: str) -> bool:
        return ".lora_E" in parameter  # P and Q are held orthonormal
