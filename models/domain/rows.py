"""Rows of a data set after parsing: what the renderer and the objectives work on.

Every shape that a file may have (``worker/data/shapes``) becomes one of these forms.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from models.domain.base import Frozen, JsonObject, Text, require_known

Role = Literal["system", "developer", "user", "assistant", "tool"]


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # to Python it is 0 or 1
        raise PydanticCustomError("boolean_weight", "Input should be 0 or 1, not a boolean")
    return value


class TextPart(Frozen):
    """One part of a message whose content is a list; only text is accepted."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="wrap")
    @classmethod
    def _name_what_is_unknown(cls, value: Any, parse: ModelWrapValidatorHandler[Self]) -> Self:
        """Suggest a field for an unknown one, unless the part is not of text at all."""
        try:
            return parse(value)
        except ValidationError as error:
            if all(each["type"] in ("extra_forbidden", "missing") for each in error.errors()):
                require_known(cls, value)
            raise


class ChatMessage(Frozen):
    """One turn of a conversation in OpenAI's chat format.

    `weight` 0 on an assistant turn keeps it as context and trains nothing on it;
    `reasoning_content` is what an assistant thought before it answered.
    """

    role: Role
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    weight: Annotated[Literal[0, 1] | None, BeforeValidator(_no_boolean)] = None
    reasoning_content: Text | None = None
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

    form: ClassVar[str] = "chat"

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[JsonObject] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRow(Frozen):
    """A text and how it goes on; only the completion is learned."""

    form: ClassVar[str] = "completion"

    prompt: Text
    completion: Text


class TextRow(Frozen):
    """Running text, all of which is learned."""

    form: ClassVar[str] = "text"

    text: Text


class PreferenceRow(Frozen):
    """A conversation and two answers to it, the first of which is the better one."""

    form: ClassVar[str] = "preference"

    messages: list[ChatMessage]
    preferred: ChatMessage
    rejected: ChatMessage
    tools: list[JsonObject] | None = None


class LabelledRow(Frozen):
    """A text, or two, and the labels it has: one for classification, several for tagging."""

    form: ClassVar[str] = "labelled"

    text: Text
    text_pair: Text | None = None
    labels: list[Text]


class PairRow(Frozen):
    """Two sentences and how alike they are; without a score they belong together."""

    form: ClassVar[str] = "pair"

    first: Text
    second: Text
    score: float | None = None


class ChoiceRow(Frozen):
    """A question, its possible answers, and the index of the right one."""

    form: ClassVar[str] = "choice"

    question: Text
    choices: list[Text]
    answer: int


class Seq2SeqRow(Frozen):
    """A text and what it is to be turned into."""

    form: ClassVar[str] = "seq2seq"

    source: Text
    target: Text


Row = (
    ChatRow
    | CompletionRow
    | TextRow
    | PreferenceRow
    | LabelledRow
    | PairRow
    | ChoiceRow
    | Seq2SeqRow
)
ROW_TYPES: dict[str, type[Row]] = {
    kind.form: kind
    for kind in (
        ChatRow,
        CompletionRow,
        TextRow,
        PreferenceRow,
        LabelledRow,
        PairRow,
        ChoiceRow,
        Seq2SeqRow,
    )
}


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
        for key in ("name", "reasoning_content", "tool_calls", "tool_call_id"):
            if (value := getattr(message, key)) is not None:
                turn[key] = value
        plain.append(turn)
    return plain
