"""What can be wrong with one parsed row, in plain words with a remedy.

Two stages: `schema_fault` translates pydantic's complaint about the shape of a row, `row_fault`
looks for what has the right shape but cannot be trained.
"""

from collections.abc import Sequence
from typing import Any, get_args

import orjson
from pydantic_core import ErrorDetails

from models.domain.base import JsonObject
from models.domain.rows import ChatMessage, ChatRow, Role, TextPart
from worker.data.records import Fault
from worker.data.shapes.base import is_blank, quoted, type_name

ROLES: tuple[str, ...] = get_args(Role)

_FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_FOREIGN_SHAPES = {
    "prompt": "prompt and completion",
    "instruction": "instruction and output",
    "conversations": "ShareGPT",
    "preferred_output": "preference",
    "chosen": "preference",
    "text": "plain text",
}
_EXPECTED = {
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "bool_type": "true or false",
}


def row_fault(row: ChatRow) -> Fault | None:
    """Return why a row of well-formed messages cannot be trained, or None."""
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
    if row.messages[0].role == "assistant" and row.messages[0].weight != 0:
        return Fault(
            "assistant_speaks_first",
            "the assistant speaks first, so there is no prompt to learn an answer to.",
            path="messages[0].role",
            hint='Put a user message before it, or give it "weight": 0.',
        )
    if all(message.weight == 0 for message in spoken):
        return Fault(
            "nothing_to_learn",
            'every assistant message has "weight": 0.',
            path="messages",
            hint="Remove the weight from the answers that the model should learn.",
        )
    return None


def messages_fault(messages: list[ChatMessage]) -> Fault | None:
    """Return what is wrong with the first bad one of well-formed messages, or None."""
    called = False
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        fault = _message_fault(message, path)
        if fault is None and message.role == "tool" and not called:
            fault = Fault(
                "tool_without_call",
                "a tool answers although no assistant message before it calls one.",
                path=path,
                hint='Put "tool_calls" into the assistant message before it.',
            )
        if fault is not None:
            return fault
        called = called or bool(message.tool_calls)
    return None


def _message_fault(message: ChatMessage, path: str) -> Fault | None:
    if message.role == "assistant":
        if not message.tool_calls and is_blank(message.text):
            return Fault(
                "empty_content",
                "the assistant's message is empty.",
                path=f"{path}.content",
                hint="Write the answer that the model should learn, or remove the row.",
            )
        return _call_fault(message.tool_calls or [], f"{path}.tool_calls")
    if message.content is None:
        return Fault(
            "missing_content",
            f"the message from {message.role!r} has no content.",
            path=f"{path}.content",
            hint="Write a string.",
        )
    for field in ("weight", "tool_calls", "reasoning_content"):
        if getattr(message, field) is not None:
            return Fault(
                "unexpected_field",
                f"only assistant messages take {field!r}.",
                path=f"{path}.{field}",
                hint="Remove it.",
            )
    return None


def _call_fault(calls: list[JsonObject], path: str) -> Fault | None:
    for number, call in enumerate(calls):
        function = call.get("function")
        place = f"{path}[{number}].function"
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return Fault(
                "invalid_tool_call",
                "the tool call names no function.",
                path=place,
                hint='Write {"type": "function", "function": {"name": …, "arguments": "{}"}}.',
            )
        if not isinstance(_arguments(function.get("arguments", "{}")), dict):
            return Fault(
                "invalid_tool_arguments",
                "the arguments are no JSON object.",
                path=f"{place}.arguments",
                hint='Write them as a string that holds a JSON object, e.g. "{}".',
            )
    return None


def _arguments(given: object) -> object:
    if not isinstance(given, str):
        return given
    try:
        return orjson.loads(given)
    except orjson.JSONDecodeError:
        return None


def schema_fault(value: dict[str, Any], errors: Sequence[ErrorDetails]) -> Fault:
    """Translate the most telling of pydantic's errors about `value`, a row as parsed JSON."""
    error = min(errors, key=_rank)
    keys = _keys(error["loc"])
    path, given = _path(keys), _at(value, keys)
    match error["type"]:
        case "unknown_field":
            return _unknown_field([*keys, error["ctx"]["field"]])
        case "missing":
            return _missing_field(keys)
        case "too_short":
            return Fault(
                "no_messages", "there is no message.", path, "Write at least one exchange."
            )
        case "literal_error":
            return _not_allowed(keys, given)
        case "boolean_weight":
            return Fault("wrong_type", "expected 0 or 1, got a boolean.", path, "Write 0 or 1.")
    if keys and keys[-1] == "content" and not isinstance(given, str | list):
        expected = "a string or an array of text parts"
    else:
        expected = _EXPECTED.get(error["type"], "")
    if not expected:
        return Fault("invalid_value", f"the value is refused: {error['msg']}.", path)
    hint = f"Write {expected}."
    return Fault("wrong_type", f"expected {expected}, got {type_name(given)}.", path, hint)


def _rank(error: ErrorDetails) -> tuple[bool, bool, bool]:
    """Order errors by what helps most.

    A list as content fails both branches of the union; the complaint that it is no string is the
    useless one. A missing field is often the other half of a misspelt one.
    """
    location = error["loc"]
    branch = [key for key in location if isinstance(key, str) and "[" in key]
    useless = bool(branch) and branch[0].startswith("function") and error["type"] == "string_type"
    return useless, error["type"] == "missing", error["type"] == "unknown_field"


def _unknown_field(keys: list[str | int]) -> Fault:
    """Say what a part of a message has beyond its text; other unknown fields never come here."""
    return Fault(
        "unknown_field",
        f"unknown field {quoted(keys[-1])}.",
        _path(keys),
        f"Known are {', '.join(TextPart.model_fields)}.",
    )


def _missing_field(keys: list[str | int]) -> Fault:
    name = str(keys[-1])
    hint = f"Name one of {', '.join(ROLES)}." if name == "role" else f"Add {quoted(name)}."
    return Fault("missing_field", f"the field {name!r} is missing.", _path(keys), hint)


def foreign_shape(value: JsonObject) -> Fault | None:
    """Return what a row without messages looks like instead, if it looks like anything."""
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
            return Fault("unknown_role", f"unknown role {quoted(given)}.", path, hint)
        case "weight":
            return Fault("invalid_value", "the weight must be 0 or 1.", path, "Use 0 or 1.")
        case "type":
            hint = "Only text parts can be trained."
            return Fault("unsupported_content", f"{quoted(given)} is not text.", path, hint)
    return Fault("wrong_type", f"expected a string, got {type_name(given)}.", path)


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
