"""What a method has to offer. Imported by the API: tensor libraries only inside functions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from models.domain.base import JsonObject, Parameters
from models.domain.estimates import BaseShape, Family
from models.errors import InvalidRequestError
from worker.training.plugins import Plugin

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from worker.training.objectives.base import LanguageForward
    from worker.training.task import Task


DEFAULT_ADAPTER = "default"
"""PEFT's name of the adapter of a model that has one."""


class Served(StrEnum):
    """How an inference server answers with what a method stores."""

    BATCHED = "batched"
    """In one batch with the base and all other batched adapters."""
    MERGED = "merged"
    """Added to the base weights in float32, as a model of its own beside the base."""
    OWN = "own"
    """On a base of its own that carries the adapter's modules: it cannot be merged."""


class MethodParams(Parameters):
    """Base of every method's parameters; each adds ``type: Literal[its name]``."""


class Method(Plugin, ABC):
    """One way to make a frozen model trainable."""

    Params: ClassVar[type[MethodParams]]
    title: ClassVar[str]
    """Its usual name, e.g. ``LoRA``."""
    when: ClassVar[str]
    """One sentence: what it is good for."""
    precisions: ClassVar[frozenset[str]] = frozenset({"nf4", "bf16", "fp32"})
    """How the base may be held (``TrainingSpec.precision.type``)."""
    families: ClassVar[frozenset[Family]] = frozenset({"decoder", "encoder", "encoder_decoder"})
    """Kinds of base models that it works on."""
    may_change: ClassVar[frozenset[str]] = frozenset()
    """Parameters that may differ from those of the adapter that a job goes on from."""
    rate_scale: ClassVar[float] = 1.0
    """What the learning rate "auto" is multiplied with, LoRA's being 1."""

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

    def redraw(self, model: "PeftModel", params: Any, seed: int) -> bool:
        """Give an adapter that has not learned the first weights that `attach` draws from `seed`.

        Args:
            model: What `attach` returned with these `params`; parameters stay the same objects.
            params: Of this method.
            seed: Of the first weights.

        Returns:
            False where that cannot be done in place; the weights are then whatever they are.
        """
        return False

    @abstractmethod
    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        """Return ``adapter_config.json`` in PEFT's form; `base_model` is a name, never a path."""

    @abstractmethod
    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return how many parameters `attach` would add to a base model of this shape."""

    @property
    def goes_on(self) -> bool:
        """Tell whether a job can go on from such an adapter: its file has all that learned."""
        return True

    def require_fit(self, params: Any, precision: str, shape: BaseShape | None) -> None:
        """Refuse a base that it cannot work on.

        Args:
            params: Of this method.
            precision: How the base is held.
            shape: Of the base; None where nobody has seen its files yet.

        Raises:
            InvalidRequestError: the two are outside the matrix (``unsupported_combination``).
        """
        if precision not in self.precisions:
            raise unsupported(
                f"precision.type: {self.title} does not train on a base held in {precision!r}. "
                f"Choose one of: {', '.join(sorted(self.precisions))}.",
                "precision.type",
            )
        if shape is not None and shape.family not in self.families:
            raise unsupported(
                f"peft.type: {self.title} needs a base model of kind "
                f"{' or '.join(sorted(self.families))}; this one is of kind {shape.family}.",
                "peft.type",
            )

    def mixes(self, params: Any) -> bool:
        """Tell whether jobs with such adapters can share passes over one base (see ``joint``)."""
        return False

    def served(self, params: Any) -> Served:
        """Return how an inference server answers with such an adapter."""
        return Served.BATCHED

    def virtual_tokens(self, params: Any) -> int:
        """Return how many positions of the base's context stand before every row."""
        return 0

    def merges(self, params: Any) -> bool:
        """Tell whether such an adapter can be added to the weights of the base."""
        return True

    def published(
        self, trained: "Mapping[str, torch.Tensor]", params: Any
    ) -> "dict[str, torch.Tensor]":
        """Return the tensors of the adapter file, by PEFT's names, from those that were trained."""
        return dict(trained)

    def taken_up(
        self, published: "Mapping[str, torch.Tensor]", params: Any
    ) -> "dict[str, torch.Tensor] | None":
        """Return what `published` was made from, or None where the file does not tell.

        A checkpoint then keeps the trained tensors beside the file, and no job can go on from it.
        """
        return dict(published)

    def first_pass(self, task: "Task", run: Callable[[], object]) -> str | None:
        """Make the pass that comes before a run's first step, whose gradients are thrown away.

        A run that goes on from a checkpoint makes it as well.

        Args:
            task: Its model is in training mode.
            run: Runs the largest micro-batch forwards and backwards.

        Returns:
            What the owner of the job should read: a method may change how it trains here.
        """
        run()
        return None

    def before_update(self, task: "Task") -> None:
        """Change the gradients of a step, which are complete, before they are clipped."""

    def after_update(self, task: "Task", step: int, total_steps: int) -> None:
        """Follow the update that made `step` of `total_steps`; its gradients are still there."""

    def kept(self, task: "Task") -> "dict[str, torch.Tensor]":
        """Return what a checkpoint has to keep beside parameters and optimizer, by names."""
        return {}

    def put_back(self, task: "Task", states: "dict[str, torch.Tensor]") -> None:
        """Take up what `kept` returned, in a fresh run."""

    def wrap_forward(
        self, model: "torch.nn.Module", forward: "LanguageForward", params: Any
    ) -> "LanguageForward":
        """Return the forward to train with, given that of one pass through the adapted `model`."""
        return forward

    def rate_factor(self, parameter: str, params: Any) -> float:
        """Return what the learning rate is multiplied with for a trainable parameter."""
        return 1.0

    def decays(self, parameter: str) -> bool:
        """Tell whether weight decay, where asked for, draws a trainable parameter towards 0."""
        return True

    @abstractmethod
    def learns_first(self, parameter: str) -> bool:
        """Tell whether a trainable parameter must have a gradient in the very first step."""


def unsupported(message: str, param: str) -> InvalidRequestError:
    """Return the error of a combination that is outside the matrix."""
    return InvalidRequestError(message, param=param, code="unsupported_combination")
