"""Virtual tokens before every row: prompt tuning (arXiv 2104.08691), prefix tuning (2101.00190).

Nothing inside of the base changes, so nothing can be merged; every row is longer by the virtual
tokens.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictInt

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape, Family
from worker.training.methods import register
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams, Served

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

Count = Annotated[StrictInt, Field(ge=1, le=512)]


class PromptParams(MethodParams):
    """Vectors before the embeddings of every row."""

    type: Literal["prompt"] = "prompt"
    n_tokens: Count = Field(20, description="Virtual tokens; they start at drawn words' vectors.")


class PrefixParams(MethodParams):
    """Keys and values before those of every row, in every layer."""

    type: Literal["prefix"] = "prefix"
    n_tokens: Count = Field(
        20, description="Virtual tokens; they start at the keys and values of drawn words."
    )


class _Virtual(Method):
    families: ClassVar[frozenset[Family]] = frozenset({"decoder"})

    def served(self, params: Any) -> Served:
        return Served.OWN

    def merges(self, params: Any) -> bool:
        return False

    def virtual_tokens(self, params: Any) -> int:
        return int(params.n_tokens)

    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        config: Any = model.peft_config[adapter]
        return {
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": params.n_tokens,
            "peft_type": config.peft_type.value,
            "task_type": "CAUSAL_LM",
            "token_dim": config.token_dim,
        }

    def published(
        self, trained: "Mapping[str, torch.Tensor]", params: Any
    ) -> "dict[str, torch.Tensor]":
        from worker.training.tuners.virtual import PARAMETER, STORED

        return {STORED: trained[PARAMETER]}

    def taken_up(
        self, published: "Mapping[str, torch.Tensor]", params: Any
    ) -> "dict[str, torch.Tensor]":
        from worker.training.tuners.virtual import PARAMETER, STORED

        return {PARAMETER: published[STORED]} if published else {}

    def decays(self, parameter: str) -> bool:
        return False  # a virtual token of zeros is no token that a base knows

    def learns_first(self, parameter: str) -> bool:
        return True


@register
class Prompt(_Virtual):
    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompt tuning"
    when: ClassVar[str] = "The smallest files; weaker than all others on small bases."
    Params: ClassVar[type[MethodParams]] = PromptParams
    rate_scale: ClassVar[float] = 10.0

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Put vectors [n, width] before the embeddings; they start at those of drawn tokens."""
        from peft import PromptTuningConfig

        from worker.training.tuners.virtual import attach_virtual, embeddings_of

        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=params.n_tokens)
        return attach_virtual(model, config, seed, adapter, embeddings_of)

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return n · width."""
        return int(params.n_tokens) * shape.width


@register
class Prefix(_Virtual):
    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "Prefix tuning"
    when: ClassVar[str] = "A small file that steers every layer; weaker than LoRA."
    Params: ClassVar[type[MethodParams]] = PrefixParams

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Put keys and values before those of all layers; they start at those of drawn tokens."""
        from peft import PrefixTuningConfig

        from worker.training.tuners.virtual import attach_virtual, states_of

        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=params.n_tokens)
        return attach_virtual(model, config, seed, adapter, states_of)

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return n · Σ (d_k + d_v) over the layers; a fused layer has both of the base's width."""
        n_states = 0
        for name, layer in shape.layers.items():
            if re.fullmatch(r"(k(ey)?|v(alue)?)(_?(proj|lin))?", name):
                n_states += layer.outputs * layer.count
            elif re.fullmatch(r"c_attn|query_key_value|w?qkv(_proj)?", name.lower()):
                n_states += 2 * shape.width * layer.count
        return int(params.n_tokens) * n_states
