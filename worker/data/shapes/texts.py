"""Shapes of plain text: prompt and completion, running text, source and target."""

from collections.abc import Mapping
from typing import ClassVar

from models.domain.base import JsonObject
from models.domain.rows import CompletionRow, Row, Seq2SeqRow, TextRow
from worker.data.records import Fault
from worker.data.shapes.base import Cells, Column, Shape


class PromptCompletion(Shape):
    """``{"prompt": "The tide is", "completion": " high."}``; an empty prompt is allowed."""

    name: ClassVar[str] = "prompt_completion"
    form: ClassVar[str] = "completion"
    columns: ClassVar[tuple[Column, ...]] = (Column(("prompt",)), Column(("completion",)))

    def build(self, cells: Cells) -> Row:
        return CompletionRow(
            prompt=cells.text("prompt", may_be_blank=True), completion=cells.text("completion")
        )

    def warnings(self, row: Row, value: JsonObject, columns: Mapping[str, str]) -> list[Fault]:
        found = super().warnings(row, value, columns)
        assert isinstance(row, CompletionRow)
        if row.prompt != row.prompt.rstrip(" \t"):
            found.append(
                Fault(
                    "trailing_space",
                    "the prompt ends in a space, which most tokenizers put before the next word.",
                    path=columns.get("prompt", "prompt"),
                    hint="Move the space to the start of the completion.",
                    level="warning",
                )
            )
        return found


class PlainText(Shape):
    """``{"text": "The tide turns twice a day."}``."""

    name: ClassVar[str] = "text"
    form: ClassVar[str] = "text"
    columns: ClassVar[tuple[Column, ...]] = (Column(("text", "content", "document")),)

    def build(self, cells: Cells) -> Row:
        return TextRow(text=cells.text("text"))


class SourceTarget(Shape):
    """``{"source": "The tide is high.", "target": "La marée est haute."}``."""

    name: ClassVar[str] = "source_target"
    form: ClassVar[str] = "seq2seq"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("source", "src", "document", "article", "input")),
        Column(("target", "tgt", "summary", "highlights", "output")),
    )

    def build(self, cells: Cells) -> Row:
        return Seq2SeqRow(source=cells.text("source"), target=cells.text("target"))
