"""The lint of an uploaded file: every fault by line, place and remedy, in constant memory.

Bytes come in as a stream and are split at ``\\n`` only: a JSON string may hold U+2028, which
``str.splitlines`` would take for a line's end. Nothing here needs a tokenizer or torch.
"""

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from models.domain.reports import MAX_FINDINGS, DatasetReport, RowFinding
from models.domain.rows import ChatRow
from worker.data import json_values
from worker.data.chat_faults import row_fault, schema_fault
from worker.data.lines import MAX_LINE_BYTES, Line, split_lines
from worker.data.records import Fault

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def lint(chunks: Iterable[bytes]) -> DatasetReport:
    """Check a whole file; the report keeps the first `MAX_FINDINGS` findings and counts all."""
    n_rows = n_valid_rows = n_findings = 0
    findings: list[RowFinding] = []
    for _, row in read_rows(chunks):
        if isinstance(row, ChatRow):
            n_rows += 1
            n_valid_rows += 1
            continue
        n_rows += row.code not in {"blank_line", "empty_file"}
        n_findings += 1
        if len(findings) < MAX_FINDINGS:
            findings.append(row)
    return DatasetReport(
        n_rows=n_rows, n_valid_rows=n_valid_rows, n_findings=n_findings, findings=findings
    )


def read_rows(chunks: Iterable[bytes]) -> Iterator[tuple[int, ChatRow | RowFinding]]:
    """Yield ``(line, row)`` for each row of a JSON lines file, or its first fault instead.

    Tolerated are CRLF, one UTF-8 byte order mark at the start, and blank lines at the end. Blank
    lines inside the file give one finding for each run of them; a file without rows gives
    ``empty_file`` at line 1; UTF-16 is reported once and ends the reading.
    """
    n_rows = 0
    blank: Line | None = None
    for line in split_lines(chunks):
        content = line.content
        if content is not None and not content.strip(b" \t\r"):
            blank = blank or line
            continue
        if blank is not None:
            yield blank.number, _blank_lines(blank.number, line.number - 1)
            blank = None
        if n_rows == 0 and content is not None and _is_utf16(content):
            yield line.number, _utf16(line.number)
            return
        n_rows += 1
        outcome = _parse(line)
        if isinstance(outcome, Fault):
            yield line.number, outcome.finding(line.number)
        else:
            yield line.number, outcome
    if n_rows == 0:
        yield (
            1,
            Fault(
                "empty_file",
                "the file has no rows.",
                hint='Write one JSON object a line, e.g. {"messages": […]}.',
            ).finding(1),
        )


def _parse(line: Line) -> ChatRow | Fault:
    content = line.content
    if content is None:
        return Fault(
            "line_too_long",
            f"the line has {line.n_bytes:,} bytes; {MAX_LINE_BYTES:,} are allowed.",
            hint="Write one JSON object a line and shorten the conversation.",
        )
    value = json_values.load(content, line.offset)
    if isinstance(value, Fault):
        return value
    if not isinstance(value, dict):
        return Fault(
            "not_an_object",
            f"the line holds {_json_type(value)}, not an object.",
            hint='Write one object a line, e.g. {"messages": […]}, without brackets around all.',
        )
    try:
        row = ChatRow.model_validate(value, strict=True)
    except ValidationError as error:
        return schema_fault(value, error.errors(include_url=False, include_input=False))
    return row_fault(row, value) or row


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _is_utf16(content: bytes) -> bool:
    """Tell UTF-16 by its mark, or by the NUL half of the first character (ASCII in JSON)."""
    return content.startswith(_UTF16_MARKS) or b"\x00" in content[:2]


def _utf16(number: int) -> RowFinding:
    return Fault(
        "invalid_encoding",
        "the file is not UTF-8: at byte offset 0 it starts like UTF-16.",
        hint="Save it as UTF-8.",
    ).finding(number)


def _blank_lines(first: int, last: int) -> RowFinding:
    what = "the line is blank." if first == last else f"lines {first} to {last} are blank."
    return Fault("blank_line", what, hint="Remove blank lines between rows.").finding(first)
