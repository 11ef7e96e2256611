"""Masked language modelling: guess the hidden words of a text from both sides."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt

from models.errors import InvalidRequestError
from worker.training.objectives import register
from worker.training.objectives.base import (
    Batch,
    Example,
    Facts,
    LossSum,
    Objective,
    ObjectiveParams,
)

if TYPE_CHECKING:
    from worker.chat import ChatRenderer
    from worker.heads import HeadKind
    from worker.training.batches import Renderer


class MlmParams(ObjectiveParams):
    """Guess hidden words (arXiv 1810.04805): teaches an encoder the language of a field."""

    type: Literal["mlm"] = "mlm"
    mask_probability: Annotated[float, Field(gt=0, le=0.5, strict=True)] = Field(
        0.15, description="Share of the tokens that are to be guessed; drawn anew in every epoch."
    )
    whole_words: StrictBool = Field(
        False, description="Hide all tokens of a word together, which is harder."
    )
    mask_token_id: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="The base model's mask token; found by itself."
    )


@register
class Mlm(Objective):
    """Of each row, the same number of tokens is hidden in every epoch; which ones is drawn."""

    name: ClassVar[str] = "mlm"
    Params: ClassVar[type[ObjectiveParams]] = MlmParams
    forms: ClassVar[frozenset[str]] = frozenset({"text"})
    head: ClassVar["HeadKind"] = "masked_lm"

    def settled(self, params: Any, facts: Facts) -> Any:
        if facts.mask_token_id is None:
            raise InvalidRequestError(
                "The base model's tokenizer has no mask token, which objective 'mlm' needs.",
                param="model",
                code="objective_not_for_base",
            )
        return params.model_copy(update={"mask_token_id": facts.mask_token_id})

    def encoding(self, params: Any) -> str:
        return f"mlm {params.mask_probability} {params.whole_words}"

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        from worker.encode.encoder import MaskableRenderer

        return MaskableRenderer(chat, params.mask_probability, whole_words=params.whole_words)

    def collate(self, examples: Sequence[Example], device: str) -> Batch:
        """Return texts as they are; what may be hidden has itself as its target."""
        import numpy as np
        import torch

        from worker.training.objectives.base import same_tokens

        batch = same_tokens(examples, device)
        words = [example.labels for example in examples if example.labels is not None]
        return Batch(
            batch.input_ids,
            batch.targets,
            batch.lengths,
            weights=torch.tensor([example.n_trained for example in examples]),
            words=torch.from_numpy(np.concatenate(words).astype(np.int64)) if words else None,
        )

    def loss(self, forward: Any, batch: Batch, params: Any) -> LossSum:
        """Hide tokens and guess them. Without gradients the same ones are hidden every time."""
        import torch

        from worker.training.losses import masking
        from worker.training.objectives.base import IGNORED

        generator = None if torch.is_grad_enabled() else torch.Generator().manual_seed(0)
        assert batch.weights is not None
        ids, device = batch.input_ids.cpu(), batch.input_ids.device
        chosen = masking.choose_all(
            (batch.targets != IGNORED).cpu(),
            batch.lengths,
            batch.weights.tolist(),
            batch.words,
            generator,
        )
        inputs, targets = masking.corrupt(
            ids, chosen, params.mask_token_id, forward.vocab_size, generator
        )
        hidden = Batch(inputs.to(device), targets.to(device), batch.lengths)
        found: LossSum = forward.cross_entropy(hidden)
        return found
