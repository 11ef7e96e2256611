"""What can be wrong with one parsed row, in plain words with a remedy.

Two stages: `schema_fault` translates pydantic's complaint about the shape of a row, `row_fault`
looks for what has the right shape but cannot be trained.
"""

import difflib
import json
from collections.abc import Sequence
from typing import Any, get_args

from pydantic_core import ErrorDetails

from models.domain.base import JsonObject
from models.domain.rows import ChatMessage, ChatRow, Role, TextPart
from worker.data.records import Fault

ROLES: tuple[str, ...] = get_args(Role)

_FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_FOREIGN_SHAPES = {
    "prompt": "prompt and completion",
    "instruction": "instruction and output",
    "conversations": "ShareGPT",
    "preferred_output": "preference",
    "text": "plain text",
}
_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
_EXPECTED = {
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "bool_type": "true or false",
}
_TYPES = {str: "a string", list: "an array", dict: "an object", bool: "a boolean"}


def row_fault(row: ChatRow, value: dict[str, Any]) -> Fault | None:
    """Return why a well-formed `row`, parsed from `value`, cannot be trained, or None."""
    for index, (message, given) in enumerate(zip(row.messages, value["messages"], strict=True)):
        fault = _message_fault(message, given, f"messages[{index}]")
        if fault is not None:
            return fault
    spoken = [message for message in row.messages if message.role == "assistant"]
    if not spoken:
        return Fault(
            "no_assistant_message",
            "the assistant never speaks, so there is nothing to learn.",
            path="messages",
            hint="End the row with the assistant's answer.",
        )
    if row.messages[-1].role != "assistant":
        return Fault(
            "last_message_not_assistant",
            f"the last message is from {row.messages[-1].role!r}, not from the assistant.",
            path=f"messages[{len(row.messages) - 1}].role",
            hint="End the row with the assistant's answer, or remove what follows it.",
        )
    if all(message.weight == 0 for message in spoken):
        return Fault(
            "nothing_to_learn",
            'every assistant message has "weight": 0.',
            path="messages",
            hint="Remove the weight from the answers that the model should learn.",
        )
    return None


def _message_fault(message: ChatMessage, given: JsonObject, path: str) -> Fault | None:
    if isinstance(given.get("weight"), bool):  # Python takes true for 1, JSON does not
        return Fault("wrong_type", "expected 0 or 1, got a boolean.", f"{path}.weight")
    if message.role == "assistant":
        if not message.tool_calls and not message.text.translate(_ZERO_WIDTH).strip():
            return Fault(
                "empty_content",
                "the assistant's message is empty.",
                path=f"{path}.content",
                hint="Write the answer that the model should learn, or remove the row.",
            )
        return None
    if message.content is None:
        return Fault(
            "missing_content",
            f"the message from {message.role!r} has no content.",
            path=f"{path}.content",
            hint="Write a string.",
        )
    for field in ("weight", "tool_calls"):
        if getattr(message, field) is not None:
            return Fault(
                "unexpected_field",
                f"only assistant messages take {field!r}.",
                path=f"{path}.{field}",
                hint="Remove it.",
            )
    return None


def schema_fault(value: dict[str, Any], errors: Sequence[ErrorDetails]) -> Fault:
    """Translate the most telling of pydantic's errors about `value`, a row as parsed JSON."""
    error = min(errors, key=_rank)
    keys = _keys(error["loc"])
    path, given = _path(keys), _at(value, keys)
    match error["type"]:
        case "extra_forbidden":
            return _unknown_field(value, keys)
        case "missing":
            return _missing_field(value, keys)
        case "too_short":
            return Fault(
                "no_messages", "there is no message.", path, "Write at least one exchange."
            )
        case "literal_error":
            return _not_allowed(keys, given)
    if keys and keys[-1] == "content" and not isinstance(given, str | list):
        expected = "a string or an array of text parts"
    else:
        expected = _EXPECTED.get(error["type"], "")
    if not expected:
        return Fault("invalid_value", f"the value is refused: {error['msg']}.", path)
    return Fault("wrong_type", f"expected {expected}, got {_type_name(given)}.", path)


def _rank(error: ErrorDetails) -> tuple[bool, bool, bool]:
    """Order errors by what helps most.

    A list as content fails both branches of the union; the complaint that it is no string is the
    useless one. A missing field is often the other half of a misspelt one.
    """
    location = error["loc"]
    branch = [key for key in location if isinstance(key, str) and "[" in key]
    useless = bool(branch) and branch[0].startswith("function") and error["type"] == "string_type"
    return useless, error["type"] == "missing", error["type"] == "extra_forbidden"


def _unknown_field(value: dict[str, Any], keys: list[str | int]) -> Fault:
    name = str(keys[-1])
    foreign = _foreign_shape(value)
    if len(keys) == 1 and foreign:
        return foreign
    model = ChatRow if len(keys) == 1 else ChatMessage if len(keys) == 3 else TextPart
    known = list(model.model_fields)
    near = difflib.get_close_matches(name[:60], known, n=1)
    if near:
        hint = f"Did you mean {near[0]!r}?"
    elif name in {"functions", "function_call"}:
        hint = "Functions are given as tools and tool_calls now."
    else:
        hint = f"Known are {', '.join(known)}."
    return Fault("unknown_field", f"unknown field {_quoted(name)}.", _path(keys), hint)


def _missing_field(value: dict[str, Any], keys: list[str | int]) -> Fault:
    name = str(keys[-1])
    foreign = _foreign_shape(value)
    if len(keys) == 1 and foreign:
        return foreign
    hint = f"Name one of {', '.join(ROLES)}." if name == "role" else f"Add {_quoted(name)}."
    return Fault("missing_field", f"the field {name!r} is missing.", _path(keys), hint)


def _foreign_shape(value: dict[str, Any]) -> Fault | None:
    if "messages" in value:
        return None
    for key, shape in _FOREIGN_SHAPES.items():
        if key in value:
            return Fault(
                "missing_field",
                f"the field 'messages' is missing; this looks like the {shape} format.",
                "messages",
                'Write {"messages": [{"role": "user", "content": …}, '
                '{"role": "assistant", "content": …}]}.',
            )
    return None


def _not_allowed(keys: list[str | int], given: object) -> Fault:
    path = _path(keys)
    match keys[-1]:
        case "role" if isinstance(given, str):
            hint = f"Use one of {', '.join(ROLES)}."
            if given.lower() in _FOREIGN_ROLES:
                hint = f"Did you mean {_FOREIGN_ROLES[given.lower()]!r}? {hint}"
            return Fault("unknown_role", f"unknown role {_quoted(given)}.", path, hint)
        case "weight":
            return Fault("invalid_value", "the weight must be 0 or 1.", path, "Use 0 or 1.")
        case "type":
            hint = "Only text parts can be trained."
            return Fault("unsupported_content", f"{_quoted(given)} is not text.", path, hint)
    return Fault("wrong_type", f"expected a string, got {_type_name(given)}.", path)


def _keys(location: tuple[str | int, ...]) -> list[str | int]:
    """Return the place in the row: without the names pydantic gives to a union's branches."""
    return [
        key
        for index, key in enumerate(location)
        if not (index == 3 and location[2] == "content" and isinstance(key, str) and "[" in key)
    ]


def _path(keys: Sequence[str | int]) -> str:
    parts = (f"[{key}]" if isinstance(key, int) else f".{key[:60]}" for key in keys)
    return "".join(parts).removeprefix(".")


def _at(value: Any, keys: Sequence[str | int]) -> Any:
    for key in keys:
        if isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        elif isinstance(value, dict) and isinstance(key, str):
            value = value.get(key)
        else:
            return None
    return value


def _type_name(value: object) -> str:
    return "null" if value is None else _TYPES.get(type(value), "a number")


def _quoted(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
