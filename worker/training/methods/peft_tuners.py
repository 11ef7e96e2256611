"""PEFT's own tuners of linear layers, all through one class: what differs is a table of settings.

Each computes with another weight ``W + ΔW`` (OFT: ``W R``), so each can be merged, and is stored in
exactly PEFT's form. Fixed random matrices (VeRA, RandLoRA) are not stored: PEFT draws them again
from the number in the file.
"""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictInt

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape, LayerShape
from models.errors import InvalidRequestError
from worker.training.methods import register
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams, Served
from worker.training.methods.lora import Targets, counted_layers, target_names

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Rank = Annotated[StrictInt, Field(ge=1, le=1024)]
Strength = Annotated[float, Field(gt=0, le=10_000, strict=True)]
_DENSE: frozenset[str] = frozenset({"bf16", "fp32"})


class TargetedParams(MethodParams):
    """Base of the parameters of tuners of linear layers."""

    target_modules: Targets = Field(
        "all-linear", description="Linear layers that are adapted: all but the head, or names."
    )


class Tuner(Method):
    """One of PEFT's tuners."""

    config_class: ClassVar[str]
    """Name of its configuration in ``peft``."""
    first: ClassVar[str] = ""
    """What is in the names of the parameters that have a gradient in the first step."""
    takes_transposed: ClassVar[bool] = False
    """Whether it works on layers with weights [in, out], as those of GPT-2 are."""

    @abstractmethod
    def settings(self, params: Any) -> JsonObject:
        """Return the fields of PEFT's configuration that differ from one job to the other."""

    @abstractmethod
    def count_layer(self, layer: LayerShape, params: Any) -> int:
        """Return how many parameters one layer of this shape gets."""

    def served(self, params: Any) -> Served:
        return Served.MERGED

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Add PEFT's modules; all but OFT's rotations start at ``ΔW = 0``, those at the identity.

        Raises:
            InvalidRequestError: a name fits no layer, or the tuner cannot take the base's layers
                with these values.
        """
        import peft

        from worker.heads import head_paths
        from worker.training.tuners.attach import (
            attach_adapter,
            is_transposed,
            linear_layers,
            without_known_warnings,
        )

        if not self.takes_transposed and is_transposed(model):
            raise InvalidRequestError(
                f"peft.type: {self.title} does not take the transposed layers of this base model "
                "(of the GPT-2 kind). Choose 'lora', 'vera' or 'randlora'.",
                param="peft.type",
                code="unsupported_combination",
            )
        settings = self.settings(params)
        if self.takes_transposed:
            settings["fan_in_fan_out"] = is_transposed(model)
        targets = target_names(model, params)
        whole: Any = model
        base = whole.get_base_model() if hasattr(whole, "peft_config") else whole
        if head_paths(base):
            # By whole paths no name means the new head too; not every configuration can exclude it.
            targets = [
                path
                for path in linear_layers(model)
                if any(f".{path}".endswith(f".{name}") for name in targets)
            ]
        with without_known_warnings():
            config = getattr(peft, self.config_class)(
                task_type="CAUSAL_LM", target_modules=targets, **settings
            )
        try:
            return attach_adapter(model, config, seed, adapter)
        except ValueError as error:  # e.g. more rows than a layer has inputs
            raise InvalidRequestError(
                f"peft: {self.title} with these values does not fit this base model: {error}",
                param="peft",
            ) from error

    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        config: Any = model.peft_config[adapter]
        settings = self.settings(params)
        if self.takes_transposed:
            settings["fan_in_fan_out"] = config.fan_in_fan_out
        return {
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "peft_type": config.peft_type.value,
            "target_modules": sorted(config.target_modules or ()),
            "task_type": "CAUSAL_LM",
            **settings,
        }

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return Σ of `count_layer` over the targeted layers."""
        layers = counted_layers(shape, params.target_modules)
        return sum(self.count_layer(layer, params) * layer.count for layer in layers)

    def learns_first(self, parameter: str) -> bool:
        return self.first in parameter


class VeraParams(TargetedParams):
    """Two vectors a layer around random matrices that all layers share (arXiv 2310.11454)."""

    type: Literal["vera"] = "vera"
    r: Rank = Field(256, description="Rank of the shared random matrices; they are not trained.")


@register
class Vera(Tuner):
    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    when: ClassVar[str] = "Thousands of tiny adapters, at some loss of quality against LoRA."
    Params: ClassVar[type[MethodParams]] = VeraParams
    rate_scale: ClassVar[float] = 10.0
    config_class: ClassVar[str] = "VeraConfig"
    first: ClassVar[str] = ".vera_lambda_b"
    takes_transposed: ClassVar[bool] = True

    def settings(self, params: Any) -> JsonObject:
        return {"r": params.r, "save_projection": False, "projection_prng_key": 0}

    def count_layer(self, layer: LayerShape, params: Any) -> int:
        """Return r + outputs: the vectors d and b (section 3.1)."""
        return int(params.r) + layer.outputs


class RandloraParams(TargetedParams):
    """Full-rank changes as weighted sums of random matrices (arXiv 2502.00987)."""

    type: Literal["randlora"] = "randlora"
    r: Rank = Field(32, description="Rank of each random matrix: less rank has more parameters.")
    alpha: Strength = Field(640.0, description="Strength: the change is scaled by alpha / r.")


@register
class Randlora(Tuner):
    name: ClassVar[str] = "randlora"
    title: ClassVar[str] = "RandLoRA"
    when: ClassVar[str] = "Changes of full rank from few parameters; slower than LoRA."
    Params: ClassVar[type[MethodParams]] = RandloraParams
    config_class: ClassVar[str] = "RandLoraConfig"
    first: ClassVar[str] = ".randlora_lambda"
    takes_transposed: ClassVar[bool] = True

    def settings(self, params: Any) -> JsonObject:
        return {
            "r": params.r,
            "randlora_alpha": params.alpha,
            "save_projection": False,
            "projection_prng_key": 0,
        }

    def count_layer(self, layer: LayerShape, params: Any) -> int:
        """Return n · (r + k) for k the shorter side and n = ⌈k / r⌉ matrices (section 4.1)."""
        k = min(layer.inputs, layer.outputs)
        n_bases = math.ceil(k / params.r)
        return n_bases * (int(params.r) + k)


class OftParams(TargetedParams):
    """The inputs of each layer are rotated, block by block (arXiv 2306.07280, 2506.19847)."""

    type: Literal["oft"] = "oft"
    block_size: Annotated[StrictInt, Field(ge=2, le=1024)] = Field(
        32, description="Width of a rotated block; where it divides no width, the next that does."
    )


@register
class Oft(Tuner):
    name: ClassVar[str] = "oft"
    title: ClassVar[str] = "OFT"
    when: ClassVar[str] = "Where the base should forget little: angles between outputs stay."
    Params: ClassVar[type[MethodParams]] = OftParams
    config_class: ClassVar[str] = "OFTConfig"

    def settings(self, params: Any) -> JsonObject:
        # r = 0: the number of blocks follows from their size.
        return {"r": 0, "oft_block_size": params.block_size}

    def count_layer(self, layer: LayerShape, params: Any) -> int:
        """Return inputs · (b − 1) / 2: of each block the upper half of a skew-symmetric matrix."""
        return layer.inputs * (_nearest_divisor(layer.inputs, params.block_size) - 1) // 2


class LohaParams(TargetedParams):
    """The element-wise product of two changes of rank r (arXiv 2108.06098)."""

    type: Literal["loha"] = "loha"
    r: Rank = Field(8, description="Rank of each of the two; their product has up to r².")
    alpha: Strength = Field(8.0, description="Strength: the change is scaled by alpha / r.")


@register
class Loha(Tuner):
    name: ClassVar[str] = "loha"
    title: ClassVar[str] = "LoHa"
    when: ClassVar[str] = "Higher rank than LoRA from as many parameters."
    Params: ClassVar[type[MethodParams]] = LohaParams
    precisions: ClassVar[frozenset[str]] = _DENSE
    config_class: ClassVar[str] = "LoHaConfig"
    first: ClassVar[str] = ".hada_w2_b"

    def settings(self, params: Any) -> JsonObject:
        return {"r": params.r, "alpha": params.alpha}

    def count_layer(self, layer: LayerShape, params: Any) -> int:
        """Return 2r · (inputs + outputs)."""
        return 2 * int(params.r) * (layer.inputs + layer.outputs)


class LokrParams(TargetedParams):
    """The Kronecker product of a small matrix and one of rank r (arXiv 2309.14859)."""

    type: Literal["lokr"] = "lokr"
    r: Rank = Field(8, description="Rank of the second factor; it is whole where r is near to it.")
    alpha: Strength = Field(8.0, description="Strength: the change is scaled by alpha / r.")


@register
class Lokr(Tuner):
    name: ClassVar[str] = "lokr"
    title: ClassVar[str] = "LoKr"
    when: ClassVar[str] = "Smaller files than LoRA's at a higher rank."
    Params: ClassVar[type[MethodParams]] = LokrParams
    precisions: ClassVar[frozenset[str]] = _DENSE
    config_class: ClassVar[str] = "LoKrConfig"
    first: ClassVar[str] = ".lokr_w1"

    def settings(self, params: Any) -> JsonObject:
        return {"r": params.r, "alpha": params.alpha}

    def count_layer(self, layer: LayerShape, params: Any) -> int:
        """Return the sizes of both factors; sides are split where they are nearest to square."""
        (small_out, out), (small_in, into) = (
            _near_square(side) for side in (layer.outputs, layer.inputs)
        )
        is_whole = params.r >= max(out, into) / 2
        return small_out * small_in + (out * into if is_whole else int(params.r) * (out + into))


class MissParams(TargetedParams):
    """One small block, repeated along each layer's inputs (arXiv 2409.15371)."""

    type: Literal["miss"] = "miss"
    r: Rank = Field(64, description="Rows of the block; at most the inputs of the smallest layer.")


@register
class Miss(Tuner):
    name: ClassVar[str] = "miss"
    title: ClassVar[str] = "MiSS"
    when: ClassVar[str] = "Large bases: less memory and time than LoRA at a like quality."
    Params: ClassVar[type[MethodParams]] = MissParams
    config_class: ClassVar[str] = "MissConfig"

    def settings(self, params: Any) -> JsonObject:
        return {"r": params.r}

    def count_layer(self, layer: LayerShape, params: Any) -> int:
        """Return r · outputs."""
        return int(params.r) * layer.outputs


def _nearest_divisor(n: int, near: int) -> int:
    """Return the divisor of `n` nearest to `near`, the lower of two; all of `n` beyond it."""
    divisors = [each for each in range(1, n + 1) if n % each == 0]
    return min(divisors, key=lambda each: (abs(each - near), each))


def _near_square(n: int) -> tuple[int, int]:
    """Return the two factors of `n` that are nearest to each other, the smaller one first."""
    small = next(each for each in range(math.isqrt(n), 0, -1) if n % each == 0)
    return small, n // small
