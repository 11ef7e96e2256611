"""The lint of an uploaded file: every fault by line, place and remedy, in constant memory.

Bytes come in as a stream and are split at ``\\n`` only: a JSON string may hold U+2028, which
``str.splitlines`` would take for a line's end. Nothing here needs a tokenizer or torch.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson
from pydantic import ValidationError

from models.domain.reports import MAX_FINDINGS, DatasetReport, RowFinding
from models.domain.rows import ChatRow
from worker.json_lines import MAX_LINE_BYTES, Line, split_lines
from worker.row_faults import Fault, row_fault, schema_fault

MAX_DEPTH = 64
"""Nested arrays and objects of one row; orjson reads 1024 but writes only 254."""

_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
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
    if (nul := content.find(b"\x00")) >= 0:
        return Fault(
            "invalid_character",
            f"byte {line.offset + nul} of the file is NUL, which no text may contain.",
            hint="Remove it, or save the file as UTF-8 if it is UTF-16.",
        )
    value = _load(line, content)
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


def _load(line: Line, content: bytes) -> Any | Fault:
    """Return the JSON value of a line, or what is wrong with it as JSON."""
    # Without a 65th bracket no value can be too deep: nearly every row stops at this count.
    if content.count(b"{") + content.count(b"[") > MAX_DEPTH and _is_too_deep(content):
        return Fault(
            "too_deep",
            f"arrays and objects are nested more than {MAX_DEPTH} deep.",
            hint="Flatten the row.",
        )
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        return _syntax_fault(line, content, error)
    if b"\\u0000" in content and (path := _path_of_nul(value)) is not None:
        return Fault(
            "invalid_character",
            "a string contains the NUL character (U+0000).",
            path=path,
            hint="Remove it.",
        )
    # A dropped duplicate takes its quotes with it. Quotes written as \u0022 would upset the count.
    if b"\\u0022" in content or orjson.dumps(value).count(b'"') != content.count(b'"'):
        key = _duplicate_key(content)
        if key is not None:
            return Fault(
                "duplicate_key",
                f"the key {json.dumps(key[:60], ensure_ascii=False)} appears twice in one object.",
                hint="Keep one of the two.",
            )
    return value


def _syntax_fault(line: Line, content: bytes, error: orjson.JSONDecodeError) -> Fault:
    try:
        text = content.decode()
    except UnicodeDecodeError as bad:
        return Fault(
            "invalid_encoding",
            f"byte {line.offset + bad.start} of the file (0x{content[bad.start]:02X}) is not valid "
            "UTF-8.",
            hint="Save the file as UTF-8.",
        )
    at = f"column {error.pos + 1}"
    if "surrogate" in error.msg:
        return Fault(
            "invalid_character",
            f"a lone surrogate escape at {at} is no valid text.",
            hint="Write the character itself, or both halves of the pair.",
        )
    if "infinity" in error.msg or _has_constant(text):
        return Fault(
            "non_finite_number",
            f"NaN, Infinity or a number too large at {at} is not allowed in JSON.",
            hint="Write null, a string or a finite number.",
        )
    hint = "Write one complete JSON object a line."
    if line.number == 1 and text.strip() in {"[", "{"}:
        hint = "The file is one pretty-printed JSON document; write one compact object a line."
    elif text.lstrip().startswith("{'"):
        hint = "JSON strings take double quotes."
    return Fault("invalid_json", f"not valid JSON at {at}: {error.msg}.", hint=hint)


def _has_constant(text: str) -> bool:
    """Return whether the line would be JSON but for NaN or Infinity, which the stdlib accepts."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _duplicate_key(content: bytes) -> str | None:
    duplicates: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                duplicates.append(key)
            seen[key] = value
        return seen

    # Numbers stay text: the stdlib refuses integers of more than 4300 digits.
    json.loads(content, object_pairs_hook=collect, parse_int=str)
    return duplicates[0] if duplicates else None


def _is_too_deep(content: bytes) -> bool:
    """Return whether brackets outside strings nest too deep; works on broken JSON as well."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(content):
        if match[0] in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif match[0] in b"]}":
            depth -= 1
    return False


def _path_of_nul(value: Any, path: str = "") -> str | None:
    """Return where in a JSON value (at most `MAX_DEPTH` deep) a string holds NUL, if anywhere."""
    if isinstance(value, str):
        return path if "\x00" in value else None
    if isinstance(value, list):
        places = ((item, f"{path}[{index}]") for index, item in enumerate(value))
        return next((p for item, at in places if (p := _path_of_nul(item, at)) is not None), None)
    if isinstance(value, dict):
        for key, item in value.items():
            if "\x00" in key:
                return path
            inside = _path_of_nul(item, f"{path}.{key[:60]}" if path else key[:60])
            if inside is not None:
                return inside
    return None


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
