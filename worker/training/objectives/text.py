"""Continued pre-training: the next token of running text, all of which is learned."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from worker.training.objectives import register
from worker.training.objectives.base import (
    Batch,
    LanguageForward,
    LossSum,
    Objective,
    ObjectiveParams,
)

if TYPE_CHECKING:
    from worker.chat import ChatRenderer
    from worker.training.batches import Renderer


class TextParams(ObjectiveParams):
    """Go on with running text; a document that is too long becomes several rows."""

    type: Literal["text"] = "text"


@register
class Text(Objective):
    """Mean cross-entropy over all tokens; without padding, so nothing is gained by joining rows."""

    name: ClassVar[str] = "text"
    Params: ClassVar[type[ObjectiveParams]] = TextParams
    forms: ClassVar[frozenset[str]] = frozenset({"text"})

    def mixes(self, params: Any) -> bool:
        return True

    def encoding(self, params: Any) -> str:
        return self.name

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        from worker.encode.documents import DocumentRenderer

        return DocumentRenderer(chat)

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        return forward.cross_entropy(batch)
