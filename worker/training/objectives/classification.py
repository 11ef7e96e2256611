"""Classification: one label of several, any number of labels, or a number."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from models.domain.base import Text
from models.domain.rows import LabelledRow, PairRow, Row
from models.errors import InvalidRequestError
from worker.training.objectives import register
from worker.training.objectives.base import (
    Batch,
    Example,
    Facts,
    LossSum,
    Objective,
    ObjectiveParams,
    labels_of,
    same_tokens,
    segments_of,
)

if TYPE_CHECKING:
    from worker.chat import ChatRenderer
    from worker.heads import HeadKind
    from worker.row_error import RowError
    from worker.training.batches import Renderer

Labels = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=2000)
]


class ClassificationParams(ObjectiveParams):
    """Tell what kind of text it is: a classifier on an encoder; its head is in the adapter."""

    type: Literal["classification"] = "classification"
    problem: Literal["single", "multi", "regression"] = Field(
        "single",
        description="`single`: one label of several. `multi`: any number of them. `regression`: "
        "the label is a number.",
    )
    labels: Labels = Field(
        [], description="All labels, in the order of the outputs; the training file's if empty."
    )


def settle_labels(params: Any, facts: Facts) -> Any:
    """Return `params` with all labels; those of the training file where none are given.

    Raises:
        InvalidRequestError: there are fewer than two, or too many to tell, or one comes twice.
    """
    labels = list(params.labels) or facts.labels
    if labels is None:
        raise InvalidRequestError(
            "The training file has too many labels to count. Name them in 'objective.labels'.",
            param="objective.labels",
        )
    if len(labels) < 2:
        raise InvalidRequestError(
            f"A classifier needs two labels or more; there are {len(labels)}.",
            param="objective.labels",
        )
    if len(set(labels)) < len(labels):
        raise InvalidRequestError("A label comes twice.", param="objective.labels")
    return params.model_copy(update={"labels": list(labels)})


@register
class Classification(Objective):
    """Cross-entropy; summed binary cross-entropies; or the squared error. A row counts once."""

    name: ClassVar[str] = "classification"
    Params: ClassVar[type[ObjectiveParams]] = ClassificationParams
    forms: ClassVar[frozenset[str]] = frozenset({"labelled", "pair"})
    closed_labels: ClassVar[bool] = True
    head: ClassVar["HeadKind"] = "sequence_classification"

    def n_outputs(self, params: Any) -> int:
        return 1 if params.problem == "regression" else len(params.labels)

    def settled(self, params: Any, facts: Facts) -> Any:
        return params if params.problem == "regression" else settle_labels(params, facts)

    def encoding(self, params: Any) -> str:
        return f"classification {params.problem} {params.labels}"

    def renderer(self, chat: "ChatRenderer", params: Any) -> "Renderer":
        from worker.encode.encoder import ClassRenderer

        return ClassRenderer(chat, lambda row: _numbers(row, params))

    def collate(self, examples: Sequence[Example], device: str) -> Batch:
        return replace(
            same_tokens(examples, device),
            labels=labels_of(examples, device),
            segments=segments_of(examples, device),
        )

    def loss(self, forward: Any, batch: Batch, params: Any) -> LossSum:
        from torch.nn import functional

        logits = forward.outputs(batch)
        assert batch.labels is not None
        if params.problem == "single":
            wanted = batch.labels[:, 0].long()
            loss = functional.cross_entropy(logits, wanted, reduction="sum")
            loss = loss + forward.disagreement(batch, logits)
            return LossSum(loss, (logits.detach().argmax(-1) == wanted).sum())
        if params.problem == "multi":
            loss = functional.binary_cross_entropy_with_logits(
                logits, batch.labels, reduction="sum"
            )
            return LossSum(loss, ((logits.detach() > 0) == (batch.labels > 0)).all(-1).sum())
        error = logits[:, 0] - batch.labels[:, 0]
        return LossSum(error.square().sum(), (error.detach().abs() < 0.5).sum())


def _numbers(row: Row, params: Any) -> "tuple[float, ...] | RowError":
    """Return an index, a 0 or 1 for each label, or the number that a row is labelled with."""
    from worker.encode.encoder import unknown_label
    from worker.row_error import RowError

    if isinstance(row, PairRow):
        if params.problem == "regression" and row.score is not None:
            return (row.score,)
        return RowError("missing_field", "the pair has no score to learn.", path="score")
    if not isinstance(row, LabelledRow):
        return RowError("unsupported_form", f"a {row.form} row has no label.")
    if params.problem != "multi" and len(row.labels) != 1:
        return RowError(
            "wrong_number_of_labels",
            f"the row has {len(row.labels)} labels.",
            path="label",
            hint='Give it one, or set objective.problem to "multi".',
        )
    if params.problem == "regression":
        try:
            return (float(row.labels[0]),)
        except ValueError:
            return RowError("wrong_type", f"label {row.labels[0]!r} is no number.", path="label")
    unknown = [label for label in row.labels if label not in params.labels]
    if unknown:
        return unknown_label(unknown[0])
    if params.problem == "single":
        return (float(params.labels.index(row.labels[0])),)
    return tuple(float(label in row.labels) for label in params.labels)
