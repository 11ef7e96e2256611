"""Methods that train copies of the base's own parameters: all of them, or its biases.

The base stays as it is, as under any adapter, so that it can serve as a reference and be shared;
the copies are float32 and cast to the base's dtype in a pass, as master weights are.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape
from models.errors import InvalidRequestError
from worker.training.methods import register
from worker.training.methods.base import (
    DEFAULT_ADAPTER,
    Method,
    MethodParams,
    Served,
    unsupported,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class FullParams(MethodParams):
    """Every parameter learns."""

    type: Literal["full"] = "full"


class BitfitParams(MethodParams):
    """Every bias learns (arXiv 2106.10199)."""

    type: Literal["bitfit"] = "bitfit"


class _Replacement(Method):
    parameters: ClassVar[list[str] | None]
    """Last names of the parameters that are replaced; None: all."""

    def served(self, params: Any) -> Served:
        return Served.MERGED

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Add float32 copies of the parameters.

        Raises:
            InvalidRequestError: the base has no such parameter, or holds it in 4 bits.
        """
        from worker.training.tuners.attach import attach_adapter
        from worker.training.tuners.own import ReplacementConfig, replaceable

        paths = replaceable(model, self.parameters)
        if not paths:
            raise InvalidRequestError(
                f"peft.type: this base model has no parameters that {self.name!r} could train "
                "(models of the Llama kind have no biases). Choose 'lora'.",
                param="peft.type",
            )
        config = ReplacementConfig(
            task_type="CAUSAL_LM", target_modules=paths, parameters=self.parameters
        )
        return attach_adapter(model, config, seed, adapter)

    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        from worker.training.tuners.own import REPLACEMENT, replaceable

        return {
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "parameters": self.parameters,
            "peft_type": REPLACEMENT,
            "target_modules": replaceable(model, self.parameters),
            "task_type": "CAUSAL_LM",
        }

    def learns_first(self, parameter: str) -> bool:
        return False  # rows of the embedding that no token names have no gradient


@register
class Full(_Replacement):
    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    when: ClassVar[str] = (
        "Much data on a small base, or as the yardstick for the others: it costs the most memory."
    )
    Params: ClassVar[type[MethodParams]] = FullParams
    precisions: ClassVar[frozenset[str]] = frozenset({"bf16", "fp32"})
    rate_scale: ClassVar[float] = 0.1
    parameters: ClassVar[list[str] | None] = None

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return all of the base's."""
        return shape.n_linear + shape.n_other


@register
class Bitfit(_Replacement):
    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    when: ClassVar[str] = "A tiny baseline on bases that have biases (BERT, GPT-2, Phi)."
    Params: ClassVar[type[MethodParams]] = BitfitParams
    rate_scale: ClassVar[float] = 3.0
    parameters: ClassVar[list[str] | None] = ["bias"]

    def require_fit(self, params: Any, precision: str, shape: BaseShape | None) -> None:
        super().require_fit(params, precision, shape)
        if shape is not None and not shape.n_biases:
            raise unsupported(
                "peft.type: this base model has no biases (none of the Llama kind has), so "
                "'bitfit' has nothing to train. Choose 'lora' or 'ia3'.",
                "peft.type",
            )

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return the elements of all biases."""
        return shape.n_biases
