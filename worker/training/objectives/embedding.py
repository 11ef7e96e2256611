"""Embeddings: sentences that belong together get vectors that lie together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from worker.training.objectives import register
from worker.training.objectives.base import (
    Batch,
    Example,
    LossSum,
    Objective,
    ObjectiveParams,
    labels_of,
    same_tokens,
)

if TYPE_CHECKING:
    from worker.chat import ChatRenderer
    from worker.heads import HeadKind
    from worker.training.batches import Renderer


class EmbeddingParams(ObjectiveParams):
    """Bring together the vectors of what belongs together, for search and comparison."""

    type: Literal["embedding"] = "embedding"
    loss: Literal["contrastive", "cosine"] = Field(
        "contrastive",
        description="`contrastive`: pairs belong together, all others of a batch do not. "
        "`cosine`: the cosine of a pair is its score.",
    )
    temperature: Annotated[float, Field(gt=0, le=1, strict=True)] = Field(
        0.05, description="Of the contrastive loss: lower looks more at what is hard to tell apart."
    )


@register
class Embedding(Objective):
    """A pair counts once. Wrong partners are those that go through the model with it."""

    name: ClassVar[str] = "embedding"
    Params: ClassVar[type[ObjectiveParams]] = EmbeddingParams
    forms: ClassVar[frozenset[str]] = frozenset({"pair"})
    head: ClassVar["HeadKind"] = "embedding"

    def encoding(self, params: Any) -> str:
        return self.name

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        from worker.encode.encoder import SentencePairRenderer

        return SentencePairRenderer(chat)

    def collate(self, examples: Sequence[Example], device: str) -> Batch:
        """Return first and second sentences in turn."""
        return replace(same_tokens(examples, device), labels=labels_of(examples, device))

    def loss(self, forward: Any, batch: Batch, params: Any) -> LossSum:
        from worker.training.losses import contrastive

        vectors = forward.pooled(batch)
        first, second = vectors[0::2], vectors[1::2]
        if params.loss == "cosine":
            assert batch.labels is not None
            losses, hits = contrastive.scored(first, second, batch.labels[:, 0])
        else:
            losses, hits = contrastive.in_batch(first, second, params.temperature)
        return LossSum(losses.sum(), hits.sum())
