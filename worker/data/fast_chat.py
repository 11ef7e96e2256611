"""The fast lane of the lint: rows that are plainly fine, told from their text in microseconds.

A row is let through only if it is the everyday one: ``messages`` of ``role``, text ``content`` and
perhaps ``weight``, roles in turn, the assistant last, no special token, no key twice. Everything
else, good or bad, goes the slow way, which alone finds faults and words them. So the rule that
tests hold against this module is: what it accepts, the slow way accepts without a warning, as the
same row.
"""

from typing import ClassVar, Literal

import msgspec

from worker.data.shapes.base import SPECIAL_TOKEN_BYTES, is_blank


class FastMessage(msgspec.Struct, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """Looks like a ``ChatMessage``; the fields are in the order of the canonical text."""

    content: str
    role: Literal["system", "developer", "user", "assistant"]
    weight: Literal[0, 1] | None = None

    name: ClassVar[None] = None
    reasoning_content: ClassVar[None] = None
    tool_calls: ClassVar[None] = None
    tool_call_id: ClassVar[None] = None


class FastRow(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """Looks like a ``ChatRow``."""

    messages: list[FastMessage]

    form: ClassVar[str] = "chat"
    tools: ClassVar[None] = None
    parallel_tool_calls: ClassVar[None] = None


_DECODER = msgspec.json.Decoder(FastRow)
_ENCODER = msgspec.json.Encoder()
_QUOTES_OF_ROW = 2
_QUOTES_OF_MESSAGE = 8
_QUOTES_OF_WEIGHT = 2
_TURNS = frozenset(
    {
        ("", "system"),
        ("", "developer"),
        ("", "user"),
        ("system", "user"),
        ("developer", "user"),
        ("user", "assistant"),
        ("assistant", "user"),
    }
)


def canonical(row: FastRow) -> bytes:
    """Return the row's canonical text (``normalised.canonical``)."""
    return _ENCODER.encode(row)


def accept(raw: bytes) -> FastRow | None:
    """Return the row if it is plainly fine, None if the slow way must look at it."""
    try:
        row = _DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    messages = row.messages
    previous = ""
    n_quotes = _QUOTES_OF_ROW + _QUOTES_OF_MESSAGE * len(messages)
    learns = False
    for message in messages:
        role, content = message.role, message.content
        if (previous, role) not in _TURNS:
            return None
        if not content or (not content[0].isalnum() and is_blank(content)):
            return None
        if role == "assistant":
            learns = learns or message.weight != 0
        if message.weight is not None:
            if role != "assistant":
                return None
            n_quotes += _QUOTES_OF_WEIGHT
        previous = role
    if previous != "assistant" or not learns:
        return None
    return None if _is_odd(raw, messages, n_quotes) else row


def _is_odd(raw: bytes, messages: list[FastMessage], n_quotes: int) -> bool:
    """Whether the text holds what the parsed row does not show.

    A key that is given twice has quotes that are in no field, unless text hides its own as escapes.
    """
    n_more = raw.count(b'"') - n_quotes
    if n_more and n_more != sum(message.content.count('"') for message in messages):
        return True
    if b"\\" in raw and b"\\u00" in raw and (b"\\u0022" in raw or b"\\u0000" in raw):
        return True
    if b"<" in raw or raw.count(b"[") > 1:
        return SPECIAL_TOKEN_BYTES.search(raw) is not None
    return False
