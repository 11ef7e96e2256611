"""(IA)³ (arXiv 2205.05638, section 3.3): learned gains on keys, values and the feed-forward.

``k ← l_k ⊙ k``, ``v ← l_v ⊙ v`` in every attention, and ``l_ff ⊙ f(W₁ x)`` before W₂ in every
feed-forward. All gains start at 1. Targets are the paper's in every family, not PEFT's defaults.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape
from models.errors import InvalidRequestError
from worker.training.methods import register
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class Ia3Params(MethodParams):
    """Gains on keys, values and the hidden layer of the feed-forward; nothing to choose."""

    type: Literal["ia3"] = "ia3"


@register
class Ia3(Method):
    """Through peft, with gains on fused layers held at 1 where they are of queries."""

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "(IA)³, T-Few"
    when: ClassVar[str] = (
        "A few dozen examples, or thousands of adapters: a hundred times smaller than LoRA."
    )
    Params: ClassVar[type[MethodParams]] = Ia3Params
    rate_scale: ClassVar[float] = 5.0

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Add gains of 1.

        Raises:
            InvalidRequestError: the model has no attention or feed-forward as transformers have.
        """
        from peft import IA3Config

        from worker.training.tuners.attach import attach_adapter, is_transposed
        from worker.training.tuners.families import anatomy
        from worker.training.tuners.fused import hold_queries

        found = anatomy(model)
        if not found.feed_forward_outputs or not (found.keys or found.fused):
            raise InvalidRequestError(
                "peft.type: (IA)³ found no keys, values and feed-forward in this base model. "
                "Choose 'lora'.",
                param="peft.type",
            )
        config = IA3Config(
            task_type="CAUSAL_LM",
            target_modules=[
                *found.keys,
                *found.values,
                *found.fused,
                *found.feed_forward_outputs,
            ],
            feedforward_modules=found.feed_forward_outputs,
            fan_in_fan_out=is_transposed(model),
        )
        adapted = attach_adapter(model, config, seed, adapter)
        hold_queries(adapted, found.fused, adapter)
        return adapted

    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        from peft import IA3Config

        config = model.peft_config[adapter]
        assert isinstance(config, IA3Config)
        return {
            "base_model_name_or_path": base_model,
            "fan_in_fan_out": config.fan_in_fan_out,
            "feedforward_modules": sorted(config.feedforward_modules or ()),
            "inference_mode": True,
            "init_ia3_weights": True,
            "peft_type": "IA3",
            "target_modules": sorted(config.target_modules or ()),
            "task_type": "CAUSAL_LM",
        }

    def taken_up(
        self, published: "Mapping[str, torch.Tensor]", params: Any
    ) -> "dict[str, torch.Tensor]":
        return dict(published)

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return Σ d_k + d_v + d_ff over the blocks, as far as names tell layers apart.

        Fused layers count with all their outputs.
        """
        n_parameters = 0
        for name, layer in shape.layers.items():
            is_gained = re.fullmatch(r"(k(ey)?|v(alue)?)(_?(proj|lin))?", name) is not None
            if is_gained or re.fullmatch(r"c_attn|query_key_value|w?qkv(_proj)?", name.lower()):
                n_parameters += layer.outputs * layer.count
            elif layer.inputs > layer.outputs and layer.outputs == shape.width:
                n_parameters += layer.inputs * layer.count
        return n_parameters

    def decays(self, parameter: str) -> bool:
        return False  # gains rest at 1, not at 0

    def learns_first(self, parameter: str) -> bool:
        return True
