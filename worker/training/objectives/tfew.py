"""T-Few: multiple choice from few examples, with three losses added up."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, StrictBool

from worker.training.objectives import register
from worker.training.objectives.base import (
    IGNORED,
    Batch,
    LanguageForward,
    LossSum,
    Objective,
    ObjectiveParams,
)

if TYPE_CHECKING:
    from worker.chat import ChatRenderer
    from worker.training.batches import Renderer


class TfewParams(ObjectiveParams):
    """Choose the right answer after few examples (arXiv 2205.05638); goes with method `ia3`."""

    type: Literal["tfew"] = "tfew"
    unlikelihood: StrictBool = Field(
        True, description="Make the tokens of wrong choices less likely."
    )
    length_normalised: StrictBool = Field(
        True, description="Make the right choice the likeliest, whatever the choices' lengths."
    )


@register
class Tfew(Objective):
    """L_LM + L_UL + L_LN of each row; accuracy is that of rank classification."""

    name: ClassVar[str] = "tfew"
    Params: ClassVar[type[ObjectiveParams]] = TfewParams
    forms: ClassVar[frozenset[str]] = frozenset({"choice"})

    def encoding(self, params: Any) -> str:
        return "choices"

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        from worker.encode.choices import ChoiceRenderer

        return ChoiceRenderer(chat)

    def loss(self, forward: LanguageForward, batch: Batch, params: Any) -> LossSum:
        import torch

        from worker.training.losses import tfew

        counts = [int((row != IGNORED).sum()) for row in batch.targets.split(batch.lengths)]
        choices = list(forward.log_probs(batch).split(counts))
        losses, hits, start = [], [], 0
        for n_choices in batch.n_sequences:
            right, *wrong = row = choices[start : start + n_choices]
            scores = tfew.scores_of(row)
            loss = tfew.likelihood(right)
            if params.unlikelihood:
                loss = loss + tfew.unlikelihood(torch.cat(wrong))
            if params.length_normalised:
                loss = loss + tfew.length_normalised(scores)
            losses.append(loss)
            hits.append(scores.detach().argmax() == 0)
            start += n_choices
        return LossSum(torch.stack(losses).sum(), torch.stack(hits).sum())
