"""Rows of a data set after parsing: what the renderer and the objectives work on."""

from typing import Annotated, Any, Literal

from pydantic import Field

from models.domain.base import Frozen, JsonObject, Text

Role = Literal["system", "developer", "user", "assistant", "tool"]


class TextPart(Frozen):
    """One part of a message whose content is a list; only text is accepted."""

    type: Literal["text"]
    text: Text


class ChatMessage(Frozen):
    """One turn of a conversation in OpenAI's chat format.

    `weight` 0 on an assistant turn keeps it as context and trains nothing on it.
    """

    role: Role
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    weight: Literal[0, 1] | None = None
    tool_calls: list[JsonObject] | None = None
    tool_call_id: Text | None = None

    @property
    def text(self) -> str:
        """The content as one string; the parts of a list are joined without a separator."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRow(Frozen):
    """One training example: a conversation and, optionally, the tools the assistant may call."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[JsonObject] | None = None
    parallel_tool_calls: bool | None = None


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as a chat template expects them: plain text content, no training fields.

    ``developer`` is OpenAI's newer name of ``system``, which no open template knows.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        for key in ("name", "tool_calls", "tool_call_id"):
            if (value := getattr(message, key)) is not None:
                turn[key] = value
        plain.append(turn)
    return plain
