"""What a method has to offer. Imported by the API: tensor libraries only inside functions."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from models.domain.base import JsonObject, Parameters
from models.domain.estimates import BaseShape
from worker.training.plugins import Plugin

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


DEFAULT_ADAPTER = "default"
"""PEFT's name of the adapter of a model that has one."""


class MethodParams(Parameters):
    """Base of every method's parameters; each adds ``type: Literal[its name]``."""


class Method(Plugin, ABC):
    """One way to make a frozen model trainable."""

    Params: ClassVar[type[MethodParams]]
    may_change: ClassVar[frozenset[str]] = frozenset()
    """Parameters that may differ from those of the adapter that a job goes on from."""

    @abstractmethod
    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Add trainable float32 weights to `model`, in place, drawn from `seed`.

        Args:
            model: A base, or one that has adapters already, which stay as they are.
            params: Of this method.
            seed: Of the first weights, which do not depend on the other adapters.
            adapter: PEFT's name of what is added; the model has none of this name.

        Raises:
            InvalidRequestError: `params` do not fit this model.
        """

    @abstractmethod
    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        """Return ``adapter_config.json`` in PEFT's form; `base_model` is a name, never a path."""

    @abstractmethod
    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return how many parameters `attach` would add to a base model of this shape."""

    def rate_factor(self, parameter: str, params: Any) -> float:
        """Return what the learning rate is multiplied with for a trainable parameter."""
        return 1.0

    @abstractmethod
    def learns_first(self, parameter: str) -> bool:
        """Tell whether a trainable parameter must have a gradient in the very first step."""
