"""AdaMix (arXiv 2205.12410): a mixture of adapters in training, their mean in use.

Every training pass draws one expert of each layer; two passes with draws of their own are held
together by a divergence. What is stored is the mean of the experts: an ordinary bottleneck
adapter, or, over LoRA with a shared B, exactly an ordinary LoRA: B · mean(Aᵢ) = mean(B · Aᵢ).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictInt

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape
from worker.training.methods import register
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams
from worker.training.methods.houlsby import bottleneck_config, places
from worker.training.methods.lora import Lora, LoraParams

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from worker.training.objectives.base import LanguageForward


class AdamixParams(MethodParams):
    """Experts that training draws from, and that are averaged afterwards."""

    type: Literal["adamix"] = "adamix"
    over: Literal["houlsby", "lora"] = Field(
        "houlsby",
        description=(
            "`houlsby`: experts of a bottleneck after each feed-forward, as released. `lora`: "
            "experts of A with one B; stored as plain LoRA."
        ),
    )
    r: Annotated[StrictInt, Field(ge=1, le=256)] = Field(
        16, description="Width of the bottleneck, or rank."
    )
    experts: Annotated[StrictInt, Field(ge=1, le=16)] = Field(
        4, description="Experts of each layer; 4 for understanding, 8 for generation."
    )
    shares_up: bool = Field(
        True, strict=True, description="One up-projection for all experts of a bottleneck."
    )
    consistency: Annotated[float, Field(ge=0, le=1000, strict=True)] = Field(
        1.0,
        description=(
            "Weight of the divergence between two passes, a token's mean; the released code of "
            "text generation has 100. At 0 there is one pass."
        ),
    )

    @property
    def lora(self) -> LoraParams:
        """The LoRA whose A has experts: strength 2r, as LoRA's default."""
        return LoraParams(r=self.r, alpha=2.0 * self.r, dropout=0.0)


@register
class Adamix(Method):
    """Over our bottlenecks or peft's LoRA, whose linear maps become experts."""

    name: ClassVar[str] = "adamix"
    title: ClassVar[str] = "AdaMix"
    when: ClassVar[str] = (
        "The last points of quality on small data: three to four times the steps, two passes each."
    )
    Params: ClassVar[type[MethodParams]] = AdamixParams
    rate_scale: ClassVar[float] = 3.0

    @property
    def goes_on(self) -> bool:
        return False  # a mean does not tell the experts

    def merges(self, params: Any) -> bool:
        return bool(params.over == "lora")

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Add experts that are drawn one by one.

        Raises:
            InvalidRequestError: the model has no layers to adapt.
        """
        from worker.training.tuners.attach import attach_adapter
        from worker.training.tuners.experts import split_into_experts
        from worker.training.tuners.own import BottleneckConfig

        if params.over == "lora":
            adapted = Lora().attach(model, params.lora, seed, adapter)
            split_into_experts(adapted, params.experts, seed, adapter)
            return adapted
        outputs, _ = places(model, "pfeiffer")
        config = BottleneckConfig(
            task_type="CAUSAL_LM",
            r=params.r,
            std=0.02,
            n_experts=params.experts,
            shares_up=params.shares_up,
            target_modules=outputs,
        )
        return attach_adapter(model, config, seed, adapter)

    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        if params.over == "lora":
            return Lora().adapter_config(model, params.lora, base_model, adapter)
        outputs, norms = places(model, "pfeiffer")
        return bottleneck_config(base_model, params.r, "gelu", outputs, norms)

    def published(
        self, trained: "Mapping[str, torch.Tensor]", params: Any
    ) -> "dict[str, torch.Tensor]":
        """Return the means of the experts, weights and biases (section 3.3)."""
        from worker.training.tuners.experts import means_of_experts

        return means_of_experts(trained)

    def taken_up(self, published: "Mapping[str, torch.Tensor]", params: Any) -> None:
        return None

    def wrap_forward(
        self, model: "nn.Module", forward: "LanguageForward", params: Any
    ) -> "LanguageForward":
        if not params.consistency:
            return forward
        from worker.training.tuners.experts import ConsistentForward

        return ConsistentForward(model, forward, params.consistency)

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return L(M(dm + m) + md + d) with a shared up-projection, L·M(2dm + m + d) without.

        Over LoRA, Σ r · (M · inputs + outputs).
        """
        n, r, width = params.experts, params.r, shape.width
        if params.over == "lora":
            layers = shape.layers.values()
            return sum(r * (n * each.inputs + each.outputs) * each.count for each in layers)
        n_up = 1 if params.shares_up else n
        return shape.n_blocks * (n * (width * r + r) + n_up * (width * r + width))

    def learns_first(self, parameter: str) -> bool:
        return False  # an expert that was not drawn has no gradient
