"""MEFT (arXiv 2306.00477): two streams whose activations are computed back instead of kept.

In the exact form of ``worker.training.reversible``: the streams are integers and λ a power of 2, so
what comes back is what went in, through any number of layers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape, Family
from worker.training.methods import register
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from worker.training.task import Task


class MeftParams(MethodParams):
    """Bottlenecks beside the layers of a model that is made reversible."""

    type: Literal["meft"] = "meft"
    variant: Literal["meft1", "meft2", "meft3"] = Field(
        "meft1",
        description=(
            "What F and G are in y1 = λ·x1 + F(x2), y2 = β·x2 + G(y1). `meft1`: the layer, then a "
            "bottleneck. `meft2`: a bottleneck, then the layer. `meft3`: the attention, then the "
            "feed-forward."
        ),
    )
    r: Annotated[StrictInt, Field(ge=1, le=4096)] = Field(
        16, description="Width of the bottlenecks, of which a layer has two."
    )
    lambda_bits: Annotated[StrictInt, Field(ge=1, le=7)] = Field(
        7,
        description=(
            "λ = 2^-lambda_bits scales the older stream, and so many bits are kept of each "
            "activation and layer. 7 starts nearest to the base; 3 keeps least."
        ),
    )
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = Field(
        0.0, description="Share of the bottleneck's units that are dropped in training."
    )
    reversible: StrictBool = Field(
        True,
        description=(
            "Compute activations back. `false` keeps the input of every layer, as gradient "
            "checkpointing does: the same gradients with more memory."
        ),
    )


@register
class Meft(Method):
    """As a tuner of our own in PEFT's form, with float32 weights."""

    name: ClassVar[str] = "meft"
    title: ClassVar[str] = "MEFT"
    when: ClassVar[str] = (
        "Where activations are what does not fit: memory hardly grows with depth, a step takes the "
        "time of one with gradient checkpointing."
    )
    Params: ClassVar[type[MethodParams]] = MeftParams
    rate_scale: ClassVar[float] = 3.0
    families: ClassVar[frozenset[Family]] = frozenset({"decoder", "encoder"})
    may_change: ClassVar[frozenset[str]] = frozenset({"dropout", "reversible"})

    def merges(self, params: Any) -> bool:
        return False

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Wrap all layers; the bottlenecks start at N(0, 0.01) with biases of 0.

        Raises:
            InvalidRequestError: the model is no single stack of Transformer layers, or its layers
                cannot be taken apart as ``meft3`` wants.
        """
        from worker.training.reversible.tuner import MeftConfig, activation_of, stack_of
        from worker.training.tuners.attach import attach_adapter

        config = MeftConfig(
            task_type="CAUSAL_LM",
            variant=params.variant,
            lambda_bits=params.lambda_bits,
            r=params.r,
            activation=activation_of(model),
            dropout=params.dropout,
        )
        adapted = attach_adapter(model, config, seed, adapter)
        stack_of(adapted).keeps_inputs = not params.reversible
        return adapted

    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        """Return the configuration with the wrapped layers by their paths, from the bottom."""
        from worker.training.reversible.tuner import PEFT_TYPE, MeftConfig, stack_of

        config = model.peft_config[adapter]
        assert isinstance(config, MeftConfig)
        return {
            "activation": config.activation,
            "base_model_name_or_path": base_model,
            "dropout": params.dropout,
            "inference_mode": True,
            "lambda_bits": params.lambda_bits,
            "peft_type": PEFT_TYPE,
            "r": params.r,
            "target_modules": list(stack_of(model).paths),
            "task_type": "CAUSAL_LM",
            "variant": params.variant,
        }

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return n · (2·d·r + r + d): two bottlenecks a layer, one fewer in all for meft1."""
        n_bottlenecks = 2 * shape.n_blocks - (params.variant == "meft1")
        return n_bottlenecks * (2 * shape.width * params.r + params.r + shape.width)

    def first_pass(self, task: "Task", run: Callable[[], object]) -> str | None:
        """Require that the activations come back; where they do not, keep the layers' inputs."""
        from worker.training.reversible.streams import NotReversibleError
        from worker.training.reversible.tuner import stack_of

        try:
            run()
        except NotReversibleError:
            stack_of(task.model).keeps_inputs = True
            task.model.zero_grad(set_to_none=True)
            run()
            return (
                "This device does not repeat its own results bit for bit, so activations cannot be "
                "computed back; the input of every layer is kept instead, as gradient "
                "checkpointing does. The result is the same, the memory more."
            )
        return None

    def learns_first(self, parameter: str) -> bool:
        return True
