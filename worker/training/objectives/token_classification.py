"""Token classification: a label for every word of a text, e.g. names and places."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from worker.training.objectives import register
from worker.training.objectives.base import (
    IGNORED,
    Batch,
    Example,
    Facts,
    LossSum,
    Objective,
    ObjectiveParams,
    same_tokens,
)
from worker.training.objectives.classification import Labels, settle_labels

if TYPE_CHECKING:
    from worker.chat import ChatRenderer
    from worker.heads import HeadKind
    from worker.training.batches import Renderer


class TokenClassificationParams(ObjectiveParams):
    """Label every word: names, places, parts of speech. Words are separated by white space."""

    type: Literal["token_classification"] = "token_classification"
    labels: Labels = Field(
        [], description="All labels, in the order of the outputs; the training file's if empty."
    )


@register
class TokenClassification(Objective):
    """Mean cross-entropy over words: the first token of each stands for it."""

    name: ClassVar[str] = "token_classification"
    Params: ClassVar[type[ObjectiveParams]] = TokenClassificationParams
    forms: ClassVar[frozenset[str]] = frozenset({"labelled"})
    closed_labels: ClassVar[bool] = True
    head: ClassVar["HeadKind"] = "token_classification"

    def n_outputs(self, params: Any) -> int:
        return len(params.labels)

    def settled(self, params: Any, facts: Facts) -> Any:
        return settle_labels(params, facts)

    def encoding(self, params: Any) -> str:
        return f"token_classification {params.labels}"

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        from worker.encode.encoder import TaggedRenderer

        return TaggedRenderer(chat, params.labels)

    def collate(self, examples: Sequence[Example], device: str) -> Batch:
        """Return texts with the label of each first token of a word as its target."""
        import numpy as np
        import torch

        plain = same_tokens(examples, device)
        labels = np.concatenate([each.labels for each in examples if each.labels is not None])
        trained = np.concatenate([each.trained for each in examples])
        targets = np.where(trained, labels.astype(np.int64), IGNORED)
        return Batch(plain.input_ids, torch.from_numpy(targets).to(device), plain.lengths)

    def loss(self, forward: Any, batch: Batch, params: Any) -> LossSum:
        from torch.nn import functional

        logits = forward.outputs(batch)
        loss = functional.cross_entropy(
            logits, batch.targets, ignore_index=IGNORED, reduction="sum"
        )
        return LossSum(loss, (logits.detach().argmax(-1) == batch.targets).sum())
