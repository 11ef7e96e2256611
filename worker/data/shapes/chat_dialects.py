"""Shapes that become conversations: ShareGPT, Alpaca, question and answer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from models.domain.base import JsonObject
from models.domain.rows import ChatMessage, ChatRow, Row
from worker.data.records import Fault
from worker.data.shapes.base import (
    BadRow,
    Cells,
    Column,
    Shape,
    quoted,
    special_token_warnings,
    type_name,
)
from worker.data.shapes.chat import chat_texts, conversation_warnings, parse_messages
from worker.data.shapes.chat_faults import row_fault

_ROLE_KEYS = ("from", "role", "speaker")
_TEXT_KEYS = ("value", "content", "text")
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}


class _Conversation(Shape):
    """A shape that has conversations behind its columns."""

    form: ClassVar[str] = "chat"

    def warnings(self, row: Row, value: JsonObject, columns: Mapping[str, str]) -> list[Fault]:
        assert isinstance(row, ChatRow)
        path = columns.get("conversations", "")
        found = self.ignored_columns(value, columns)
        if path:
            found += conversation_warnings(row.messages, None, path)
        return found + special_token_warnings(chat_texts(row.messages, path))


class ShareGPT(_Conversation):
    """``{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}``."""

    name: ClassVar[str] = "sharegpt"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("conversations", "conversation", "messages", "dialog", "turns")),
        Column(("system",), required=False),
    )

    def fits(self, sample: list[JsonObject], columns: Mapping[str, str]) -> bool:
        return any(
            isinstance(turn, dict) and any(key in turn for key in _ROLE_KEYS)
            for row in sample
            for turn in _list(row.get(columns["conversations"]))
        )

    def build(self, cells: Cells) -> Row:
        given, path = cells.get("conversations"), cells.path("conversations")
        if not isinstance(given, list):
            what = type_name(given)
            raise BadRow(Fault("wrong_type", f"expected an array, got {what}.", path=path))
        turns = [self._turn(turn, f"{path}[{at}]") for at, turn in enumerate(given)]
        messages = parse_messages(turns, path, None, may_be_empty=False)
        if cells.has("system"):
            messages = [ChatMessage(role="system", content=cells.text("system")), *messages]
        row = ChatRow(messages=messages)
        fault = row_fault(row)
        if fault is not None:
            raise BadRow(replace(fault, path=path + fault.path.removeprefix("messages")))
        return row

    def _turn(self, turn: Any, path: str) -> JsonObject:
        if not isinstance(turn, dict):
            what = type_name(turn)
            raise BadRow(Fault("wrong_type", f"expected an object, got {what}.", path=path))
        role_key = next((key for key in _ROLE_KEYS if key in turn), None)
        text_key = next((key for key in _TEXT_KEYS if key in turn), None)
        if role_key is None or text_key is None:
            name = "from" if role_key is None else "value"
            hint = f"Add {quoted(name)}."
            raise BadRow(
                Fault("missing_field", f"the field {name!r} is missing.", f"{path}.{name}", hint)
            )
        speaker = turn[role_key]
        role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            hint = f"Use one of {', '.join(_ROLES)}."
            place = f"{path}.{role_key}"
            if speaker in ("function_call", "observation", "tool", "function_response"):
                hint = 'Write conversations with tools in OpenAI\'s format ("messages").'
            raise BadRow(Fault("unknown_role", f"unknown role {quoted(speaker)}.", place, hint))
        message: JsonObject = {"role": role, "content": turn[text_key]}
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        return message


class Alpaca(_Conversation):
    """``{"instruction": …, "input": …, "output": …}``, perhaps with a system text and a history."""

    name: ClassVar[str] = "alpaca"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("instruction",)),
        Column(("output", "response", "completion")),
        Column(("input", "context"), required=False),
        Column(("system", "system_prompt"), required=False),
        Column(("history",), required=False),
    )

    def build(self, cells: Cells) -> Row:
        messages = []
        if cells.has("system") and (system := cells.text("system", may_be_blank=True)).strip():
            messages.append(ChatMessage(role="system", content=system))
        if cells.has("history"):
            messages += self._history(cells.get("history"), cells.path("history"), cells)
        question = cells.text("instruction")
        if cells.has("input") and (more := cells.text("input", may_be_blank=True)).strip():
            question = f"{question}\n\n{more}"
        messages.append(ChatMessage(role="user", content=question))
        messages.append(ChatMessage(role="assistant", content=cells.text("output")))
        return ChatRow(messages=messages)

    def _history(self, given: object, path: str, cells: Cells) -> list[ChatMessage]:
        messages = []
        for at, exchange in enumerate(_list(given)):
            if not isinstance(exchange, list) or len(exchange) != 2:
                hint = "Write pairs: [[question, answer], …]."
                raise BadRow(Fault("wrong_type", "expected a pair.", f"{path}[{at}]", hint))
            question, answer = (
                cells.checked(text, f"{path}[{at}][{side}]") for side, text in enumerate(exchange)
            )
            messages += [
                ChatMessage(role="user", content=question),
                ChatMessage(role="assistant", content=answer),
            ]
        return messages


class QuestionAnswer(_Conversation):
    """``{"question": …, "answer": …}``."""

    name: ClassVar[str] = "question_answer"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("question", "query", "prompt", "user")),
        Column(("answer", "response", "assistant")),
        Column(("system", "system_prompt"), required=False),
    )

    def build(self, cells: Cells) -> Row:
        messages = [
            ChatMessage(role="user", content=cells.text("question")),
            ChatMessage(role="assistant", content=cells.text("answer")),
        ]
        if cells.has("system") and (system := cells.text("system", may_be_blank=True)).strip():
            messages.insert(0, ChatMessage(role="system", content=system))
        return ChatRow(messages=messages)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
