"""The words that the readers, the shapes and the lint share: a record, and a fault in one."""

from dataclasses import dataclass
from typing import Literal

from models.domain.base import JsonObject
from models.domain.reports import RowFinding


@dataclass(slots=True)
class Record:
    """One row of a file before its shape is known.

    Attributes:
        line: Counts from 1. The line on which the row starts; in formats without lines (Parquet,
            Arrow) the number of the row.
        offset: Position of the row's first byte in the decompressed file; None where the format has
            no such thing.
        raw: The row as JSON text in UTF-8; None where the format is not JSON.
        value: The row by column; None where `raw` is given, which ``json_values.load`` parses.
    """

    line: int
    offset: int | None
    raw: bytes | None = None
    value: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A finding that does not know its line yet.

    `path` is the place inside the row, e.g. ``messages[1].role``; `message` is a sentence without
    a capital at its start, `hint` says what to do about it.
    """

    code: str
    message: str
    path: str = ""
    hint: str = ""
    level: Literal["error", "warning"] = "error"

    def finding(self, line: int, offset: int | None = None) -> RowFinding:
        return RowFinding(
            line=line,
            code=self.code,
            message=self.message,
            path=self.path,
            hint=self.hint,
            offset=offset,
            level=self.level,
        )
