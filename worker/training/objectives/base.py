"""What an objective has to offer. Imported by the API: tensor libraries only inside functions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from models.domain.base import Parameters
from worker.training.plugins import Plugin

if TYPE_CHECKING:
    import numpy as np
    import torch
    from peft import PeftModel


class ObjectiveParams(Parameters):
    """Base of every objective's parameters; each adds ``type: Literal[its name]``."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready to train on.

    `input_ids` is int32 [T]; `trained` is bool [T] and says which ids are targets of the loss
    (never the first, which nothing predicts). `line` is the row's line in its file, from 1.
    """

    line: int
    input_ids: "np.ndarray"
    trained: "np.ndarray"
    n_trained: int


IGNORED = -100
"""The target of a position where nothing is learned."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples one after another, without padding: int64 [T] each, rows of `lengths` tokens.

    `targets` holds, at each position, the id that it has to predict, or `IGNORED`.
    """

    input_ids: "torch.Tensor"
    targets: "torch.Tensor"
    lengths: list[int]


@dataclass(frozen=True, slots=True)
class LossSum:
    """Sums over the trained tokens of a batch, so that several batches can make up one step.

    `loss` is a scalar float32 with a graph behind it, in nats; `n_correct` a scalar int64 of
    arg-max hits.
    """

    loss: "torch.Tensor"
    n_correct: "torch.Tensor"


class LanguageForward(Protocol):
    """How batches go through a causal language model (``worker.training.forward``)."""

    pads: bool
    """Whether short rows of a micro-batch cost as much as its longest."""

    def cross_entropy(self, batch: Batch) -> LossSum:
        """Return Σ −log p(target), in nats, and the arg-max hits of the batch."""

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Return the logits [N, vocabulary] of the N targets in order."""


class Objective(Plugin, ABC):
    """One loss over one kind of rows."""

    Params: ClassVar[type[ObjectiveParams]]
    forms: ClassVar[frozenset[str]]
    """Forms of rows (``models.domain.rows``) that can be trained with it."""
    closed_labels: ClassVar[bool] = False
    """Whether the labels of the training file are all there can be, as in classification."""

    def mixes(self, params: Any) -> bool:
        """Tell whether batches of several jobs may share one pass through the base.

        True only where `loss` is the forward's cross-entropy and `prepare` changes nothing.
        """
        return False

    def prepare(self, model: "PeftModel", params: Any) -> None:
        """Change `model` for training, once and in place; most objectives need nothing."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], device: str) -> Batch:
        """Put examples one after another, on `device`."""

    @abstractmethod
    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        """Return sums over the batch's trained tokens; the loop divides by the step's."""
