"""Pydantic's findings in plain words: one error that names the first faulty field."""

from collections.abc import Sequence
from typing import Any

from models.errors import InvalidRequestError

MAX_SENTENCES = 10
_CODES = {
    "missing": "missing_required_parameter",
    "unknown_field": "unknown_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
_BRANCHES = {"str", "int", "float", "bool", "dict", "list", "NamedTool"}


def explain(findings: Sequence[Any], *prefix: str) -> InvalidRequestError:
    """Return one error for all `findings` of a ``ValidationError`` or ``RequestValidationError``.

    Args:
        findings: What ``error.errors()`` returns; must not be empty.
        prefix: Where the checked value stands in the request, e.g. ``"peft"``.

    Returns:
        An error whose `param` is the path of the first faulty field, such as ``peft.r`` or
        ``messages[1].role``. The branches of a union are one sentence.
    """
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        parts: list[str | int] = [*prefix, *finding["loc"]]
        if finding["type"] == "unknown_field":
            parts.append(finding["ctx"]["field"])
        reason = str(finding["msg"]).removeprefix("Value error, ").removesuffix(".")
        told = reasons.setdefault(_path(parts), [])
        if reason not in told:
            told.append(reason)
    sentences = [
        f"{where}: {', or '.join(these)}" if where else ", or ".join(these)
        for where, these in reasons.items()
    ]
    text = " ".join(
        sentence if sentence.endswith("?") else f"{sentence}."
        for sentence in sentences[:MAX_SENTENCES]
    )
    if len(sentences) > MAX_SENTENCES:
        text += f" ({len(sentences) - MAX_SENTENCES} more.)"
    return InvalidRequestError(
        text, param=next(iter(reasons)) or None, code=_CODES.get(findings[0]["type"])
    )


def _path(parts: Sequence[str | int]) -> str:
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _BRANCHES and part.replace(".", "").replace("_", "").isalnum():
            path += f".{part}" if path else part
    return path
