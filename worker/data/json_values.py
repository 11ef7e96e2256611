"""JSON text of one row to a value, with everything refused that JSON libraries let pass.

Refused are duplicate keys, NaN and Infinity, lone surrogates, NUL and deep nesting, each by its own
code; what is accepted can be stored in every database and written back as it was.
"""

import json
import re
from typing import Any

import orjson

from worker.data.records import Fault

MAX_DEPTH = 64
"""Nested arrays and objects of one row; orjson reads 1024 but writes only 254."""

_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def load(content: bytes, offset: int = 0) -> Any | Fault:
    """Return the value of one row of JSON text, or what is wrong with it as JSON.

    Args:
        content: The text of one row, without the line break that ends it.
        offset: Position of its first byte in the file, for messages.
    """
    if (nul := content.find(b"\x00")) >= 0:
        return Fault(
            "invalid_character",
            f"byte {offset + nul} of the file is NUL, which no text may contain.",
            hint="Remove it, or save the file as UTF-8 if it is UTF-16.",
        )
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
        return _syntax_fault(content, offset, error)
    if b"\\u0000" in content and (fault := nul_fault(value)) is not None:
        return fault
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


def _syntax_fault(content: bytes, offset: int, error: orjson.JSONDecodeError) -> Fault:
    try:
        text = content.decode()
    except UnicodeDecodeError as bad:
        return Fault(
            "invalid_encoding",
            f"byte {offset + bad.start} of the file (0x{content[bad.start]:02X}) is not valid "
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
    if text.lstrip().startswith("{'"):
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


def nul_fault(value: Any) -> Fault | None:
    """Return where a value holds NUL, which no database takes, if it does."""
    path = _path_of_nul(value)
    if path is None:
        return None
    what = "a string contains the NUL character (U+0000)."
    return Fault("invalid_character", what, path=path, hint="Remove it.")


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
