"""Shapes for classifiers and encoders: labelled texts, sentence pairs, multiple choice."""

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

from models.domain.base import JsonObject
from models.domain.rows import ChoiceRow, LabelledRow, PairRow, Row
from worker.data.records import Fault
from worker.data.shapes.base import BadRow, Cells, Column, Shape, is_blank, quoted, type_name

_FIRST = ("text", "sentence", "content", "review", "comment", "utterance")
_LABEL = ("label", "labels", "class", "category", "intent", "target", "sentiment")
_FIRST_OF_PAIR = ("text", "premise", "sentence1", "text_a", "question1", "first")
_SECOND_OF_PAIR = ("text_pair", "hypothesis", "sentence2", "text_b", "question2", "second")


class LabelledText(Shape):
    """``{"text": "The gate is stuck", "label": "gate"}``; a list of labels is tagging."""

    name: ClassVar[str] = "labelled_text"
    form: ClassVar[str] = "labelled"
    columns: ClassVar[tuple[Column, ...]] = (Column(_FIRST), Column(_LABEL))

    def build(self, cells: Cells) -> Row:
        return LabelledRow(text=cells.text("text"), labels=labels_of(cells))


class LabelledPair(Shape):
    """``{"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}``."""

    name: ClassVar[str] = "labelled_pair"
    form: ClassVar[str] = "labelled"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(_FIRST_OF_PAIR),
        Column(_SECOND_OF_PAIR),
        Column(_LABEL),
    )

    def build(self, cells: Cells) -> Row:
        return LabelledRow(
            text=cells.text("text"), text_pair=cells.text("text_pair"), labels=labels_of(cells)
        )


def labels_of(cells: Cells) -> list[str]:
    """Return the labels as text: numbers and booleans are names as good as words."""
    given, path = cells.get("label"), cells.path("label")
    labels = given if isinstance(given, list) else [given]
    if not labels:
        raise BadRow(Fault("empty_label", "the list of labels is empty.", path=path))
    return [_label(label, path) for label in labels]


def _label(label: object, path: str) -> str:
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, int):
        return str(label)
    if not isinstance(label, str):
        what = type_name(label)
        hint = "A label is a word or a whole number."
        raise BadRow(Fault("wrong_type", f"{what} is no label.", path=path, hint=hint))
    if is_blank(label):
        raise BadRow(Fault("empty_label", "the label is empty.", path=path, hint="Name the class."))
    return label.strip()


class SentencePair(Shape):
    """``{"sentence1": …, "sentence2": …, "score": 0.9}``, or pairs that belong together."""

    name: ClassVar[str] = "sentence_pair"
    form: ClassVar[str] = "pair"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("first", "sentence1", "anchor", "query", "text_a", "question1")),
        Column(("second", "sentence2", "positive", "document", "text_b", "question2")),
        Column(("score", "similarity"), required=False),
    )

    def build(self, cells: Cells) -> Row:
        first, second = cells.text("first"), cells.text("second")
        score = self._score(cells) if cells.has("score") else None
        return PairRow(first=first, second=second, score=score)

    def _score(self, cells: Cells) -> float:
        given, path = cells.get("score"), cells.path("score")
        try:
            score = float(given) if isinstance(given, str | int | float) else math.nan
        except ValueError:
            score = math.nan
        if isinstance(given, bool) or not math.isfinite(score):
            raise BadRow(
                Fault(
                    "invalid_score",
                    f"{quoted(given)} is no finite number.",
                    path=path,
                    hint="Write a number, e.g. between 0 and 1.",
                )
            )
        return score


class MultipleChoice(Shape):
    """``{"question": …, "choices": ["a", "b"], "answer": 0}``.

    The answer is an index from 0, a letter (A is the first) or the text of a choice.
    """

    name: ClassVar[str] = "multiple_choice"
    form: ClassVar[str] = "choice"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("question", "prompt", "input", "premise")),
        Column(("choices", "options", "answers", "endings")),
        Column(("answer", "label", "correct", "answer_index", "target", "answerKey")),
    )

    def fits(self, sample: list[JsonObject], columns: Mapping[str, str]) -> bool:
        return all(isinstance(row.get(columns["choices"]), list | dict) for row in sample)

    def build(self, cells: Cells) -> Row:
        question = cells.text("question")
        names, choices = self._choices(cells)
        path = cells.path("answer")
        answer = self._index(cells.get("answer"), names, choices)
        if answer is None:
            raise BadRow(
                Fault(
                    "answer_out_of_range",
                    f"{quoted(cells.get('answer'))} is none of the {len(choices)} choices.",
                    path=path,
                    hint=f"Write an index from 0 to {len(choices) - 1}, a letter, or the choice.",
                )
            )
        return ChoiceRow(question=question, choices=choices, answer=answer)

    def _choices(self, cells: Cells) -> tuple[list[str], list[str]]:
        """Return the choices' names and texts; ``{"text": […], "label": […]}`` names them."""
        given, path = cells.get("choices"), cells.path("choices")
        names: object = None
        if isinstance(given, dict):
            names = given.get("label")
            given = given.get("text")
        if not isinstance(given, list) or len(given) < 2:
            raise BadRow(
                Fault("wrong_type", "expected an array of two or more choices.", path=path)
            )
        choices = [cells.checked(each, f"{path}[{at}]") for at, each in enumerate(given)]
        if len(set(choices)) < len(choices):
            raise BadRow(Fault("repeated_choice", "two choices are the same.", path=path))
        letters = [chr(ord("A") + at) for at in range(len(choices))]
        if isinstance(names, list) and len(names) == len(choices):
            return [str(name) for name in names], choices
        return letters, choices

    def _index(self, given: object, names: list[str], choices: list[str]) -> int | None:
        if isinstance(given, int) and not isinstance(given, bool):
            return given if 0 <= given < len(choices) else None
        if not isinstance(given, str):
            return None
        if given in choices:
            return choices.index(given)
        if given.strip() in names:
            return names.index(given.strip())
        if given.strip().isdecimal() and int(given) < len(choices):
            return int(given)
        return None

    def texts(self, row: Row, columns: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        assert isinstance(row, ChoiceRow)
        yield columns["question"], row.question
        for at, choice in enumerate(row.choices):
            yield f"{columns['choices']}[{at}]", choice
