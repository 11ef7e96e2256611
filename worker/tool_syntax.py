"""How a chat template writes tool calls: found by having it write two.

Templates have no field that says so, and models write what their template taught them. Known
styles: Hermes and Qwen (``<tool_call>`` around JSON), Llama 3 (bare JSON with ``parameters``),
Mistral (a list after ``[TOOL_CALLS]``); any other that writes JSON is found just so.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.domain.base import JsonObject

_NAMES = ("zqfirst", "zqsecond")
_ARGUMENTS = {"zqkey": "zqvalue"}

PROBE_TOOLS: list[JsonObject] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": {"zqkey": {"type": "string"}}},
        },
    }
    for name in _NAMES
]

Pieces = tuple[str | int, ...]
"""A text in which special tokens are ids."""


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """The parts of ``opening · before_name · NAME · between · ARGUMENTS · after · closing``.

    Several calls are `separator` apart: each with opening and closing, or, in a list, all between
    one pair of them. None: the template takes one call only.
    """

    opening: Pieces
    before_name: str
    between: str
    after: str
    closing: Pieces
    separator: str | None
    is_list: bool

    @property
    def marker(self) -> str:
        """What announces a call in the text, of which special tokens are no part; may be empty."""
        return text_of(self.opening).strip().removesuffix("[").rstrip()

    @property
    def end_marker(self) -> str:
        """What ends a call in the text; may be empty."""
        return text_of(self.closing).strip().removeprefix("]").lstrip()


HERMES = ToolSyntax(
    opening=("<tool_call>\n",),
    before_name='{"name": "',
    between='", "arguments": ',
    after="}",
    closing=("\n</tool_call>",),
    separator="\n",
    is_list=False,
)
"""The commonest style; what is looked for where a template's own is not JSON."""


def text_of(pieces: Pieces) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


def probe_question() -> dict[str, Any]:
    """Return the turn before `probe_turn`."""
    return {"role": "user", "content": "a"}


def probe_turn(n_calls: int) -> dict[str, Any]:
    """Return an assistant turn, as templates take it, that calls the first probe tools."""
    calls = [
        {
            "id": f"call{index:05d}",
            "type": "function",
            "function": {"name": name, "arguments": dict(_ARGUMENTS)},
        }
        for index, name in enumerate(_NAMES[:n_calls])
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def syntax_of(answers: list[str | None], split: Callable[[str], Pieces]) -> ToolSyntax:
    """Return the syntax of a template, `HERMES` if it writes no calls as JSON.

    Args:
        answers: What it writes for ``probe_turn(1)`` and ``probe_turn(2)``, without the prompt
            and without what ends the turn; None where it refuses.
        split: Cuts a text at special tokens.
    """
    one, two = answers
    if one is None or (found := _find(one, 0)) is None:
        return HERMES
    start, end = found
    body = one[start:end]
    name_at = body.find(_NAMES[0])
    arguments = json.dumps(_ARGUMENTS, separators=(",", ":"))
    written = next((each for each in _spellings() if each in body), arguments)
    arguments_at = body.find(written)
    if not 0 <= name_at < arguments_at:
        return HERMES
    opening, closing, is_list = one[:start], one[end:], _is_list(one, start)
    separator = None
    if two is not None and (second := _find(two, end)) is not None:
        gap = two[end : second[0]]
        if is_list:
            separator = gap
        elif gap.startswith(closing) and gap.endswith(opening):
            separator = gap[len(closing) : len(gap) - len(opening)]
    depth = sum({"{": 1, "}": -1}.get(char, 0) for char in body[:arguments_at])
    return ToolSyntax(
        opening=split(opening),
        before_name=body[:name_at],
        between=body[name_at + len(_NAMES[0]) : arguments_at],
        after="}" * depth,
        closing=split(closing),
        separator=separator,
        is_list=is_list,
    )


def _find(text: str, since: int) -> tuple[int, int] | None:
    """Return start and end of the first JSON object from `since` on that names a tool."""
    decoder = json.JSONDecoder()
    for start in (at for at in range(since, len(text)) if text[at] == "{"):
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if (call := as_call(value)) is not None and call[0] in _NAMES:
            return start, end
    return None


def _is_list(text: str, start: int) -> bool:
    """Return whether the object at `start` is the first of a JSON list."""
    at = text[:start].rstrip()
    if not at.endswith("["):
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(text, len(at) - 1)
    except ValueError:
        return False
    return isinstance(value, list)


def _spellings() -> list[str]:
    return [
        json.dumps(_ARGUMENTS, separators=(comma, colon))
        for comma, colon in ((", ", ": "), (",", ":"))
    ]


def as_call(value: object) -> tuple[str, str] | None:
    """Return name and arguments (JSON text) if a parsed `value` is a tool call in any style."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name", inner if isinstance(inner, str) else None)
    for key in ("arguments", "parameters", "args"):
        if isinstance(name, str) and key in value:
            arguments = value[key]
            if isinstance(arguments, str):
                return name, arguments
            return name, json.dumps(arguments, ensure_ascii=False)
    return None
