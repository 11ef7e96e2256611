"""OpenAI's chat format, with what its older and newer spellings and other tools add to it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import ValidationError

from models.domain.base import JsonObject
from models.domain.rows import ChatMessage, ChatRow, Row
from worker.data.records import Fault
from worker.data.shapes.base import (
    BadRow,
    Cells,
    Column,
    Shape,
    ignored_field,
    near_miss,
    quoted,
    special_token_warnings,
    type_name,
)
from worker.data.shapes.chat_faults import foreign_shape, messages_fault, row_fault, schema_fault

_REASONING = ("reasoning_content", "reasoning", "thinking")
_LEGACY = {"function_call"}
MESSAGE_KEYS = frozenset(ChatMessage.model_fields) | set(_REASONING) | _LEGACY


class OpenAIChat(Shape):
    """``{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}``."""

    name: ClassVar[str] = "openai_chat"
    form: ClassVar[str] = "chat"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("messages",)),
        Column(("tools", "functions"), required=False),
        Column(("parallel_tool_calls",), required=False),
    )

    def fits(self, sample: list[JsonObject], columns: Mapping[str, str]) -> bool:
        turns = [turn for row in sample for turn in _dicts(row.get(columns["messages"]))]
        return not any("from" in turn and "role" not in turn for turn in turns)

    def build(self, cells: Cells) -> Row:
        value, path = cells.value, cells.path("messages")
        if path not in value:
            fault = foreign_shape(value)
            if fault is not None:
                raise BadRow(fault)
        for key in value:
            _refuse_misspelt(key, value, [column.name for column in self.columns], "")
        if value.get("weight", 1) not in (1, None):
            hint = 'Leave rows out, repeat them, or set "weight": 0 on their messages.'
            raise BadRow(
                Fault("unsupported_field", "rows cannot be weighted.", path="weight", hint=hint)
            )
        tools = _tools(cells)
        messages = parse_messages(cells.get("messages"), path, tools, may_be_empty=False)
        row = ChatRow.model_construct(messages=messages, tools=tools)
        parallel = value.get(cells.path("parallel_tool_calls"))
        if parallel is not None:
            if not isinstance(parallel, bool):
                what = type_name(parallel)
                raise BadRow(
                    Fault(
                        "wrong_type",
                        f"expected true or false, got {what}.",
                        path=cells.path("parallel_tool_calls"),
                    )
                )
            row = row.model_copy(update={"parallel_tool_calls": parallel})
        fault = row_fault(row)
        if fault is not None:
            raise BadRow(_moved(fault, path))
        return row

    def warnings(self, row: Row, value: JsonObject, columns: Mapping[str, str]) -> list[Fault]:
        assert isinstance(row, ChatRow)
        path = columns.get("messages", "messages")
        return [
            *self.ignored_columns(value, columns),
            *ignored_in_messages(value.get(path), path),
            *conversation_warnings(row.messages, row.tools, path),
            *special_token_warnings(chat_texts(row.messages, path)),
        ]


def parse_messages(
    given: Any, path: str, tools: list[JsonObject] | None, *, may_be_empty: bool = True
) -> list[ChatMessage]:
    """Return the messages of a conversation.

    Args:
        given: The value as in the file.
        path: Where it is in the row.
        tools: The functions that the assistant may call, if the row names any.

    Raises:
        BadRow: a message is malformed or out of place.
    """
    if may_be_empty and given == []:
        return []
    cleaned = given
    if isinstance(given, list):
        cleaned = [_cleaned(message, f"{path}[{at}]") for at, message in enumerate(given)]
        _answer_legacy_calls(cleaned)
    value = {"messages": cleaned, **({"tools": tools} if tools else {})}
    try:
        row = ChatRow.model_validate(value, strict=True)
    except ValidationError as error:
        fault = schema_fault(value, error.errors(include_url=False, include_input=False))
        raise BadRow(_moved(fault, path)) from None
    found = messages_fault(row.messages)
    if found is not None:
        raise BadRow(_moved(found, path))
    return row.messages


def _moved(fault: Fault, path: str) -> Fault:
    """Name the place in the words of the file."""
    if path != "messages" and fault.path.startswith("messages"):
        return replace(fault, path=path + fault.path.removeprefix("messages"))
    return fault


def _dicts(value: object) -> list[JsonObject]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _refuse_misspelt(key: str, value: JsonObject, known: Iterable[str], path: str) -> None:
    if key in known:
        return
    near = near_miss(key, known)
    if near is not None and near not in value:
        raise BadRow(
            Fault(
                "unknown_field",
                f"unknown field {quoted(key)}.",
                path=f"{path}.{key[:60]}".removeprefix("."),
                hint=f"Did you mean {near!r}?",
            )
        )


def _cleaned(message: Any, path: str) -> Any:
    """Return a message with the fields that we know, in today's spelling and without nulls."""
    if not isinstance(message, dict):
        return message
    clean: JsonObject = {}
    for key, item in message.items():
        if key not in MESSAGE_KEYS:
            _refuse_misspelt(key, message, MESSAGE_KEYS, path)
        elif item is None or (key == "tool_calls" and item == []):
            continue
        elif key in _REASONING:
            clean["reasoning_content"] = item
        elif key == "function_call":
            clean["tool_calls"] = [{"id": "call_0", "type": "function", "function": item}]
        else:
            clean[key] = item
    if clean.get("role") == "function":
        clean["role"] = "tool"
    return clean


def _answer_legacy_calls(messages: list[Any]) -> None:
    """Give each call of the old kind a name of its own, and its result the same."""
    n_calls = 0
    for message in _dicts(messages):
        for call in _dicts(message.get("tool_calls")):
            if call.get("id") == "call_0" and "type" in call:
                n_calls += 1
                call["id"] = f"call_{n_calls}"
        if message.get("role") == "tool" and "tool_call_id" not in message and n_calls:
            message["tool_call_id"] = f"call_{n_calls}"


def _tools(cells: Cells) -> list[JsonObject] | None:
    path = cells.path("tools")
    given = cells.value.get(path)
    if given is None or given == []:
        return None
    if not isinstance(given, list):
        raise BadRow(Fault("wrong_type", f"expected an array, got {type_name(given)}.", path=path))
    tools = []
    for at, tool in enumerate(given):
        if not isinstance(tool, dict):
            what = type_name(tool)
            raise BadRow(Fault("wrong_type", f"expected an object, got {what}.", f"{path}[{at}]"))
        legacy = "function" not in tool and "name" in tool
        tools.append({"type": "function", "function": tool} if legacy else tool)
    return tools


def chat_texts(messages: list[ChatMessage], path: str) -> Iterable[tuple[str, str]]:
    """Yield ``(path, text)`` for the words of each message."""
    for at, message in enumerate(messages):
        if message.text:
            yield f"{path}[{at}].content", message.text


def ignored_in_messages(given: object, path: str) -> list[Fault]:
    """Return a warning for each key of a message that is not used and is not null."""
    return [
        ignored_field(key, f"{path}[{at}]")
        for at, message in enumerate(_dicts(given))
        for key, item in message.items()
        if key not in MESSAGE_KEYS and item is not None and item != []
    ]


def conversation_warnings(
    messages: list[ChatMessage], tools: list[JsonObject] | None, path: str
) -> list[Fault]:
    """Return what is odd about a conversation that can be trained."""
    found = []
    for at in range(1, len(messages)):
        before, role = messages[at - 1].role, messages[at].role
        if role == before and role in ("user", "assistant"):
            found.append(
                Fault(
                    "repeated_role",
                    f"two messages in a row are from {quoted(role)}; many templates refuse that.",
                    path=f"{path}[{at}].role",
                    hint="Join them.",
                    level="warning",
                )
            )
        if before == "assistant" and messages[at - 1].tool_calls and role != "tool":
            found.append(
                Fault(
                    "tool_call_without_result",
                    "the assistant calls a tool, and no result follows.",
                    path=f"{path}[{at - 1}].tool_calls",
                    level="warning",
                )
            )
    names = {str(tool.get("function", {}).get("name")) for tool in tools or []}
    for at, message in enumerate(messages):
        if message.role == "user" and not message.text.strip():
            found.append(
                Fault(
                    "empty_turn",
                    "the user's message is empty.",
                    path=f"{path}[{at}].content",
                    level="warning",
                )
            )
        for number, call in enumerate(message.tool_calls or []):
            name = call["function"]["name"]
            if names and name not in names:
                found.append(
                    Fault(
                        "unknown_tool",
                        f"the function {quoted(name)} is not among the row's tools.",
                        path=f"{path}[{at}].tool_calls[{number}].function.name",
                        level="warning",
                    )
                )
    return found
