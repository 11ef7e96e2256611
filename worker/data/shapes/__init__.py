"""Shapes of rows: which of them a file has, told with the evidence, or said by the person."""

from collections.abc import Mapping
from dataclasses import dataclass

from models.domain.base import JsonObject
from worker.data.records import Fault
from worker.data.shapes.base import Shape, near_miss, quoted
from worker.data.shapes.chat import OpenAIChat
from worker.data.shapes.chat_dialects import Alpaca, QuestionAnswer, ShareGPT
from worker.data.shapes.labelled import (
    LabelledPair,
    LabelledText,
    MultipleChoice,
    SentencePair,
)
from worker.data.shapes.preference import ChosenRejected, OpenAIPreference
from worker.data.shapes.texts import PlainText, PromptCompletion, SourceTarget

ORDER: tuple[Shape, ...] = (
    OpenAIChat(),
    ShareGPT(),
    OpenAIPreference(),
    ChosenRejected(),
    Alpaca(),
    MultipleChoice(),
    LabelledPair(),
    SentencePair(),
    LabelledText(),
    PromptCompletion(),
    QuestionAnswer(),
    SourceTarget(),
    PlainText(),
)
"""From the most telling column names to the least: the first that fits is taken."""

SHAPES: dict[str, Shape] = {shape.name: shape for shape in ORDER}


@dataclass(frozen=True, slots=True)
class Detection:
    """The shape of a file's rows.

    `columns` has our field names and those of the file, for the fields that the file has;
    `evidence` is one sentence.
    """

    shape: Shape
    columns: dict[str, str]
    evidence: str


def detect(
    sample: list[JsonObject], columns: Mapping[str, str], shape: str = ""
) -> Detection | Fault:
    """Return the shape of rows of which `sample` is the beginning, or why it is unknown.

    Args:
        sample: Some rows, at least one.
        columns: What a person said: our field names to the file's.
        shape: Its name, if a person said that.
    """
    present = _common_columns(sample)
    for ours, theirs in columns.items():
        if theirs not in present:
            return _unknown_column(ours, theirs, present)
    if shape and shape not in SHAPES:
        near = near_miss(shape, SHAPES)
        hint = f"Did you mean {near!r}?" if near else f"Known are {', '.join(SHAPES)}."
        return Fault("unknown_shape", f"there is no shape {quoted(shape)}.", hint=hint)
    candidates = (SHAPES[shape],) if shape else ORDER
    for candidate in candidates:
        found = _match(candidate, present, columns)
        if found is not None and (shape or candidate.fits(sample, found)):
            return Detection(candidate, found, _evidence(candidate, found, sample, bool(shape)))
    return _unknown(candidates, present)


def _common_columns(sample: list[JsonObject]) -> list[str]:
    """Return the columns that at least half of the rows have, in the order of the file."""
    counts: dict[str, int] = {}
    for row in sample:
        for name in row:
            counts[name] = counts.get(name, 0) + 1
    common = [name for name, count in counts.items() if 2 * count >= len(sample)]
    return common or list(counts)


def _match(shape: Shape, present: list[str], said: Mapping[str, str]) -> dict[str, str] | None:
    """Return which columns of the file are the shape's, or None if one that it needs is missing."""
    fields = {column.name for column in shape.columns}
    if not set(said) <= fields:
        return None
    found = dict(said)
    for column in shape.columns:
        if column.name in found:
            continue
        taken = set(found.values())
        name = next((each for each in column.names if each in present and each not in taken), None)
        if name is not None:
            found[column.name] = name
        elif column.required:
            return None
    return found


def _evidence(shape: Shape, columns: dict[str, str], sample: list[JsonObject], said: bool) -> str:
    n_rows = sum(all(name in row for name in columns.values()) for row in sample)
    names = ", ".join(quoted(name) for name in columns.values())
    how = "as asked for" if said else f"columns {names} in {n_rows} of the first {len(sample)} rows"
    return f"Rows are read as {shape.name} ({shape.form}): {how}."


def _unknown_column(ours: str, theirs: str, present: list[str]) -> Fault:
    near = near_miss(theirs, present)
    hint = f"Did you mean {near!r}?" if near else f"The file has {_names(present)}."
    return Fault(
        "unknown_column",
        f"no column {quoted(theirs)} for {quoted(ours)} is in the file.",
        hint=hint,
    )


def _unknown(candidates: tuple[Shape, ...], present: list[str]) -> Fault:
    if len(candidates) == 1:
        (shape,) = candidates
        lacking = ", ".join(
            quoted(column.name)
            for column in shape.columns
            if column.required and not set(column.names) & set(present)
        )
        return Fault(
            "unknown_shape",
            f"the rows have {_names(present)} and lack {lacking or 'what it needs'} for "
            f"{shape.name}.",
            hint=f"Map the columns, e.g. columns={{{quoted(shape.columns[0].name)}: …}}.",
        )
    near = [
        f"{name!r} may be {hit!r}"
        for name in present
        for shape in candidates
        for column in shape.columns
        if (hit := near_miss(name, column.names)) is not None and hit != name
    ]
    return Fault(
        "unknown_shape",
        f"the rows have {_names(present)}; that is none of the shapes that are known"
        + (f" ({near[0]})." if near else "."),
        hint=f'Map the columns, e.g. columns={{"messages": "conversations"}}, or write one of '
        f"{', '.join(SHAPES)}.",
    )


def _names(present: list[str]) -> str:
    shown = ", ".join(quoted(name[:40]) for name in present[:8])
    return f"the columns {shown}" + (f" and {len(present) - 8} more" if len(present) > 8 else "")
