"""Shapes of preference pairs: OpenAI's, and chosen against rejected."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from models.domain.base import JsonObject
from models.domain.rows import ChatMessage, PreferenceRow, Row
from worker.data.records import Fault
from worker.data.shapes.base import BadRow, Cells, Column, Shape, quoted, type_name
from worker.data.shapes.chat import chat_texts, parse_messages


class OpenAIPreference(Shape):
    """``{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}``."""

    name: ClassVar[str] = "openai_preference"
    form: ClassVar[str] = "preference"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("input",)),
        Column(("preferred_output", "preferred_completion")),
        Column(("non_preferred_output", "non_preferred_completion")),
    )

    def build(self, cells: Cells) -> Row:
        given = cells.get("input")
        path = cells.path("input")
        if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
            raise BadRow(
                Fault(
                    "wrong_type",
                    'expected an object with "messages".',
                    path=path,
                    hint='Write {"messages": [{"role": "user", "content": …}]}.',
                )
            )
        tools = given.get("tools") or None
        messages = parse_messages(given["messages"], f"{path}.messages", tools)
        pair = [
            _answer(cells.get(field), cells.path(field))
            for field in ("preferred_output", "non_preferred_output")
        ]
        return _row(messages, pair[0], pair[1], cells.path("non_preferred_output"), tools)

    def texts(self, row: Row, columns: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        assert isinstance(row, PreferenceRow)
        yield from chat_texts(row.messages, f"{columns['input']}.messages")
        yield columns["preferred_output"], row.preferred.text
        yield columns["non_preferred_output"], row.rejected.text


class ChosenRejected(Shape):
    """``{"prompt": …, "chosen": …, "rejected": …}``: texts, or conversations.

    Without a prompt, it is the messages that both conversations begin with.
    """

    name: ClassVar[str] = "chosen_rejected"
    form: ClassVar[str] = "preference"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(("chosen",)),
        Column(("rejected",)),
        Column(("prompt", "question", "instruction"), required=False),
        Column(("system",), required=False),
    )

    def build(self, cells: Cells) -> Row:
        chosen, rejected = cells.get("chosen"), cells.get("rejected")
        prompt = self._prompt(cells) if cells.has("prompt") else []
        if isinstance(chosen, list) and isinstance(rejected, list) and not prompt:
            n_shared = next(
                (
                    at
                    for at, (one, other) in enumerate(zip(chosen, rejected, strict=False))
                    if one != other
                ),
                min(len(chosen), len(rejected)) - 1,
            )
            path = cells.path("chosen")
            prompt = parse_messages(chosen[:n_shared], path, None)
            chosen, rejected = chosen[n_shared:], rejected[n_shared:]
        if not prompt:
            raise BadRow(
                Fault(
                    "missing_field",
                    "there is no prompt: no field for it, and no message that both answers share.",
                    path="prompt",
                    hint='Add "prompt", or begin both conversations with the same messages.',
                )
            )
        return _row(
            prompt,
            _answer(chosen, cells.path("chosen")),
            _answer(rejected, cells.path("rejected")),
            cells.path("rejected"),
            None,
        )

    def _prompt(self, cells: Cells) -> list[ChatMessage]:
        given = cells.get("prompt")
        if isinstance(given, list):
            return parse_messages(given, cells.path("prompt"), None)
        messages = [ChatMessage(role="user", content=cells.text("prompt"))]
        if cells.has("system"):
            messages.insert(0, ChatMessage(role="system", content=cells.text("system")))
        return messages

    def texts(self, row: Row, columns: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        assert isinstance(row, PreferenceRow)
        yield from chat_texts(row.messages, columns.get("prompt", columns["chosen"]))
        yield columns["chosen"], row.preferred.text
        yield columns["rejected"], row.rejected.text


def _answer(given: Any, path: str) -> ChatMessage:
    """Return the one assistant message that an answer is."""
    if isinstance(given, str):
        given = [{"role": "assistant", "content": given}]
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list):
        raise BadRow(Fault("wrong_type", f"expected an answer, got {type_name(given)}.", path=path))
    if len(given) != 1:
        raise BadRow(
            Fault(
                "wrong_answer",
                f"an answer is one assistant message, not {len(given)}.",
                path=path,
                hint="Put what comes before it into the input.",
            )
        )
    (message,) = parse_messages(given, path, None)
    if message.role != "assistant":
        raise BadRow(
            Fault(
                "wrong_answer",
                f"the answer is from {quoted(message.role)}, not from the assistant.",
                path=f"{path}[0].role",
            )
        )
    return message


def _row(
    messages: list[ChatMessage],
    preferred: ChatMessage,
    rejected: ChatMessage,
    path: str,
    tools: list[JsonObject] | None,
) -> PreferenceRow:
    if messages and messages[-1].role == "assistant":
        raise BadRow(
            Fault(
                "wrong_answer",
                "the input ends with the assistant, so there is nothing to answer.",
                path="input",
                hint="End it with the user's message.",
            )
        )
    if preferred == rejected:
        raise BadRow(
            Fault(
                "identical_pair",
                "the preferred and the rejected answer are the same.",
                path=path,
                hint="Remove the row: there is nothing to prefer.",
            )
        )
    return PreferenceRow(messages=messages, preferred=preferred, rejected=rejected, tools=tools)
