"""Sequence to sequence: a model that reads a text and writes another, such as T5 or BART."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from worker.training.objectives import register
from worker.training.objectives.base import (
    Batch,
    Example,
    LanguageForward,
    LossSum,
    Objective,
    ObjectiveParams,
    same_tokens,
)

if TYPE_CHECKING:
    from worker.chat import ChatRenderer
    from worker.heads import HeadKind
    from worker.training.batches import Renderer


class Seq2SeqParams(ObjectiveParams):
    """Turn a text into another: translate, summarise, correct."""

    type: Literal["seq2seq"] = "seq2seq"


@register
class Seq2Seq(Objective):
    """Mean cross-entropy over the tokens of the targets."""

    name: ClassVar[str] = "seq2seq"
    Params: ClassVar[type[ObjectiveParams]] = Seq2SeqParams
    forms: ClassVar[frozenset[str]] = frozenset({"seq2seq"})
    head: ClassVar["HeadKind"] = "seq2seq_lm"

    def encoding(self, params: Any) -> str:
        return self.name

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        from worker.encode.encoder import SourceTargetRenderer

        return SourceTargetRenderer(chat)

    def collate(self, examples: Sequence[Example], device: str) -> Batch:
        """Return sources and targets in turn; each token of a target is its own position's."""
        return same_tokens(examples, device)

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        return forward.cross_entropy(batch)
