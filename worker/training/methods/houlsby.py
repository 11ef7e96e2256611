"""Bottleneck adapters (arXiv 1902.00751): ``z + U f(D z + b) + c`` after the sub-layers.

Houlsby's placement has one after the attention's output projection and one after the
feed-forward's, each before the residual sum, and trains the norms of the blocks; Pfeiffer's
(arXiv 2005.00247) has the latter alone and no norms.
"""

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictInt

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape
from models.errors import InvalidRequestError
from worker.training.methods import register
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class HoulsbyParams(MethodParams):
    """Small feed-forwards inside of every block."""

    type: Literal["houlsby"] = "houlsby"
    r: Annotated[StrictInt, Field(ge=1, le=4096)] = Field(
        64, description="Width of the bottleneck (m in the paper)."
    )
    placement: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby",
        description=(
            "`houlsby`: after attention and after the feed-forward, and the norms learn too. "
            "`pfeiffer`: after the feed-forward alone."
        ),
    )
    activation: Literal["gelu", "relu", "silu"] = Field(
        "gelu", description="The non-linearity of the bottleneck."
    )


@register
class Houlsby(Method):
    """As a tuner of our own in PEFT's form."""

    name: ClassVar[str] = "houlsby"
    title: ClassVar[str] = "Houlsby adapters"
    when: ClassVar[str] = (
        "A strong alternative to LoRA on encoders; cannot be merged, so answers cost a little more."
    )
    Params: ClassVar[type[MethodParams]] = HoulsbyParams
    rate_scale: ClassVar[float] = 3.0

    def merges(self, params: Any) -> bool:
        return False

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Add near-identity bottlenecks: weights normal with σ = 0.01, cut at 2 σ; biases 0.

        Raises:
            InvalidRequestError: the model has no attention or feed-forward as transformers have.
        """
        from worker.training.tuners.attach import attach_adapter
        from worker.training.tuners.own import BottleneckConfig

        outputs, norms = places(model, params.placement)
        config = BottleneckConfig(
            task_type="CAUSAL_LM",
            r=params.r,
            activation=params.activation,
            target_modules=outputs,
            norm_modules=norms,
        )
        return attach_adapter(model, config, seed, adapter)

    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        outputs, norms = places(model, params.placement)
        return bottleneck_config(base_model, params.r, params.activation, outputs, norms)

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return 2L(2dm + m + d) and the norms of the blocks, or L(2dm + m + d) (Pfeiffer).

        A block that reads another's output has two attentions, each with values of its own.
        """
        width, r = shape.width, params.r
        one = 2 * width * r + r + width
        if params.placement == "pfeiffer":
            return int(shape.n_blocks * one)
        n_attentions = sum(
            layer.count
            for name, layer in shape.layers.items()
            if re.fullmatch(r"v(alue)?(_?(proj|lin))?", name)
        )
        return int((max(n_attentions, shape.n_blocks) + shape.n_blocks) * one + shape.n_norms)

    def learns_first(self, parameter: str) -> bool:
        return True


def places(model: "PreTrainedModel | PeftModel", placement: str) -> tuple[list[str], list[str]]:
    """Return the layers that bottlenecks follow, and the norms that learn.

    Raises:
        InvalidRequestError: the model has no attention or feed-forward as transformers have.
    """
    from worker.training.tuners.families import anatomy

    found = anatomy(model)
    if not found.feed_forward_outputs or not found.attention_outputs:
        raise InvalidRequestError(
            "peft.type: no attention and feed-forward were found in this base model that "
            "bottlenecks could follow. Choose 'lora'.",
            param="peft.type",
        )
    if placement == "pfeiffer":
        return found.feed_forward_outputs, []
    return [*found.attention_outputs, *found.feed_forward_outputs], found.norms


def bottleneck_config(
    base_model: str, r: int, activation: str, outputs: list[str], norms: list[str]
) -> JsonObject:
    """Return the configuration of an adapter of single bottlenecks in PEFT's form."""
    from worker.training.tuners.own import BOTTLENECK

    return {
        "activation": activation,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "norm_modules": norms,
        "peft_type": BOTTLENECK,
        "r": r,
        "target_modules": outputs,
        "task_type": "CAUSAL_LM",
    }
