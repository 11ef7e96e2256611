"""What an objective has to offer. Imported by the API: tensor libraries only inside functions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from models.domain.base import Parameters
from models.domain.estimates import Family
from models.errors import InvalidRequestError
from worker.training.plugins import Plugin

if TYPE_CHECKING:
    import numpy as np
    import torch
    from peft import PeftModel

    from worker.chat import ChatRenderer
    from worker.heads import HeadKind
    from worker.training.batches import Renderer


class ObjectiveParams(Parameters):
    """Base of every objective's parameters; each adds ``type: Literal[its name]``."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready to train on.

    `input_ids` is int32 [T]; `trained` is bool [T] and says which ids are targets of the loss
    (never the first, which nothing predicts). `line` is the row's line in its file, from 1.
    `n_trained` is the row's weight in the mean loss: its trained tokens, or 1 where the row as a
    whole is judged. A row of several sequences has their lengths in `parts`; `labels` is float64
    [L], what is to be told of the row.
    """

    line: int
    input_ids: "np.ndarray"
    trained: "np.ndarray"
    n_trained: int
    parts: tuple[int, ...] = ()
    labels: "np.ndarray | None" = None
    n_first: int | None = None
    """How many ids are of the first of two texts that make up one sequence."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each of its sequences."""
        return self.parts or (len(self.input_ids),)


IGNORED = -100
"""The target of a position where nothing is learned."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an objective may need to know before rows are encoded.

    `labels` are those of the training file's rows, in order of their names; None where there are
    too many to tell.
    """

    labels: tuple[str, ...] | None
    mask_token_id: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences one after another, without padding: int64 [T] each, rows of `lengths` tokens.

    `targets` holds, at each position, the id that it has to predict, or `IGNORED`. `labels` is
    float32 [N, L] of N examples, where they have labels.
    """

    input_ids: "torch.Tensor"
    targets: "torch.Tensor"
    lengths: list[int]
    labels: "torch.Tensor | None" = None
    weights: "torch.Tensor | None" = None
    """`Example.n_trained` of each example, int64 [N], where the loss needs it."""
    n_sequences: list[int] = field(default_factory=list)
    """How many of the sequences are of each example."""
    segments: "torch.Tensor | None" = None
    """Which of two texts each token is of, int64 [T], where the rows have two."""
    words: "torch.Tensor | None" = None
    """The word that each token is part of, int64 [T], −1 for none, where words are masked whole."""


@dataclass(frozen=True, slots=True)
class LossSum:
    """Sums over a batch, weighted as `Example.n_trained`, so that several can make up one step.

    `loss` is a scalar float32 with a graph behind it, in nats; `n_correct` a scalar int64 of
    arg-max hits (of pairs: those in the right order).
    """

    loss: "torch.Tensor"
    n_correct: "torch.Tensor"


class LanguageForward(Protocol):
    """How batches go through a causal language model (``worker.training.forward``)."""

    pads: bool
    """Whether short rows of a micro-batch cost as much as its longest."""

    def cross_entropy(self, batch: Batch) -> LossSum:
        """Return Σ −log p(target), in nats, and the arg-max hits of the batch."""

    def log_probs(self, batch: Batch) -> "torch.Tensor":
        """Return log p(target), in nats, float32 [N] of the N targets in order."""

    def without_adapter(self) -> AbstractContextManager[None]:
        """Make passes inside those of the frozen base alone."""

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Return the logits [N, vocabulary] of the N targets in order."""


_FAMILIES: "dict[HeadKind, Family]" = {
    "causal_lm": "decoder",
    "seq2seq_lm": "encoder_decoder",
}
"""The kind of base models that each head is put on: all others, on encoders."""


class Objective(Plugin, ABC):
    """One loss over one kind of rows."""

    Params: ClassVar[type[ObjectiveParams]]
    forms: ClassVar[frozenset[str]]
    """Forms of rows (``models.domain.rows``) that can be trained with it."""
    closed_labels: ClassVar[bool] = False
    """Whether the labels of the training file are all there can be, as in classification."""
    rate_scale: ClassVar[float] = 1.0
    """What the default learning rate is multiplied with."""

    head: ClassVar["HeadKind"] = "causal_lm"
    """What the base model is loaded with."""

    @property
    def family(self) -> Family:
        """The kind of base models that can have its head."""
        return _FAMILIES.get(self.head, "encoder")

    def require_base(self, family: Family) -> None:
        """Raise `InvalidRequestError` if a base model of this family cannot have the head."""
        wanted = self.family
        if family != wanted:
            raise InvalidRequestError(
                f"Objective '{self.name}' needs a base model of kind {wanted}; this one is of kind "
                f"{family}. Choose another base model or another objective.",
                param="objective.type",
                code="objective_not_for_base",
            )

    def n_outputs(self, params: Any) -> int:
        """Return how many outputs the head has; 0 where they are the vocabulary."""
        return 0

    def settled(self, params: Any, facts: "Facts") -> Any:
        """Return `params` with what follows from the data and the base model filled in.

        Raises:
            InvalidRequestError: the data or the base model do not allow this objective.
        """
        return params

    def mixes(self, params: Any) -> bool:
        """Tell whether batches of several jobs may share one pass through the base.

        True only where `loss` is the forward's cross-entropy and `prepare` changes nothing.
        """
        return False

    def prepare(self, model: "PeftModel", params: Any) -> None:
        """Change `model` for training, once and in place; most objectives need nothing."""

    def encoding(self, params: Any) -> str:
        """Return what of `params` decides the tokens of a row; a cache of them is named after it.

        Objectives with the same answer share tokens: "" stands for the renderer's own.
        """
        return ""

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        """Return what makes tokens of this objective's rows; `chat` is that of the tokenizer."""
        return chat

    def collate(self, examples: Sequence[Example], device: str) -> Batch:
        """Put examples one after another, on `device`; each position predicts the next id."""
        return next_tokens(examples, device)

    @abstractmethod
    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        """Return sums over the batch's trained tokens; the loop divides by the step's."""


def next_tokens(examples: Sequence[Example], device: str) -> Batch:
    """Return a batch in which each position has the next id as its target, if that is trained."""
    import numpy as np
    import torch

    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    trained = np.concatenate([example.trained for example in examples])
    # The position before a trained token predicts it; a sequence's first is never trained.
    targets = np.full_like(input_ids, IGNORED)
    targets[:-1] = np.where(trained[1:], input_ids[1:], IGNORED)
    return Batch(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(targets).to(device),
        [length for example in examples for length in example.lengths],
        n_sequences=[len(example.lengths) for example in examples],
    )


def same_tokens(examples: Sequence[Example], device: str) -> Batch:
    """Return a batch in which each trained id is its own position's target, as encoders have it."""
    import numpy as np
    import torch

    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    trained = np.concatenate([example.trained for example in examples])
    return Batch(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(np.where(trained, input_ids, IGNORED)).to(device),
        [length for example in examples for length in example.lengths],
        n_sequences=[len(example.lengths) for example in examples],
    )


def segments_of(examples: Sequence[Example], device: str) -> "torch.Tensor | None":
    """Return which of two texts each id is of, int64 [T], or None if no row has two."""
    import torch

    if all(example.n_first is None for example in examples):
        return None
    segments = []
    for example in examples:
        n_ids = len(example.input_ids)
        n_first = n_ids if example.n_first is None else example.n_first
        segments += [0] * n_first + [1] * (n_ids - n_first)
    return torch.tensor(segments, device=device)


def labels_of(examples: Sequence[Example], device: str) -> "torch.Tensor | None":
    """Return the labels of examples as float32 [N, L], or None where they have none."""
    import numpy as np
    import torch

    labels = [example.labels for example in examples if example.labels is not None]
    if not labels:
        return None
    return torch.from_numpy(np.stack(labels).astype(np.float32)).to(device)
