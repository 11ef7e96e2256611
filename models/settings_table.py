"""The table of all settings in ``docs/settings.md``, from the settings themselves.

``python -m models.settings_table > docs/settings.md`` renews the page.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import annotated_types
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from models.settings import ENV_PREFIX, Settings

_HEAD = f"""# Settings

Every process reads its settings from environment variables when it starts. A variable that begins
with `{ENV_PREFIX}` and is not listed here, or a value that does not fit, stops it with a message.
An empty variable counts as absent. Relative paths are relative to the working directory.
`tunery up` sets what it needs itself, below its own directory.

This page is generated: `python -m models.settings_table > docs/settings.md`.
"""
_KINDS: dict[Any, str] = {
    str: "text",
    SecretStr: "secret",
    Path: "path",
    bool: "`true` or `false`",
    int: "integer",
    float: "number",
}
_BOUNDS = (
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "≤"),
    (annotated_types.Lt, "lt", "<"),
)


def settings_page() -> str:
    """Return the whole page as Markdown: one section a group, one row a variable."""
    general = {n: f for n, f in Settings.model_fields.items() if _group(f) is None}
    sections = [_HEAD, *_table("General", ENV_PREFIX, general)]
    for name, field in Settings.model_fields.items():
        group = _group(field)
        if group is not None:
            sections += _table(
                name.capitalize(), f"{ENV_PREFIX}{name.upper()}__", group.model_fields
            )
    return "\n".join(sections)


def _group(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _table(title: str, prefix: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| variable | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        cells = (
            f"`{prefix}{name.upper()}`",
            _kind(field),
            _default(field),
            field.description or "",
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _kind(field: FieldInfo) -> str:
    options = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    kind = options[0] if NoneType in get_args(field.annotation) else field.annotation
    bounds = [
        f" {sign} {getattr(limit, attribute):,}"
        for limit in field.metadata
        for bound, attribute, sign in _BOUNDS
        if isinstance(limit, bound)
    ]
    return _KINDS.get(kind, "JSON") + ",".join(bounds)


def _default(field: FieldInfo) -> str:
    value = field.get_default()
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "":
        return "–"
    if isinstance(value, bool | dict):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(settings_page())
