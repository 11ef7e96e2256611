"""A row that cannot be rendered, and tool calls as templates want them."""

import json

from models.domain.base import JsonObject
from models.domain.reports import RowFinding
from models.domain.rows import ChatMessage


class RowError(ValueError):
    """A row that cannot be rendered: stable `code`, sentence, place inside the row, and remedy."""

    def __init__(self, code: str, message: str, *, path: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.path = path
        self.hint = hint

    def finding(self, line: int) -> RowFinding:
        return RowFinding(
            line=line,
            code=self.code,
            message=self.message,
            path=self.path,
            hint=self.hint,
        )


def parsed_calls(calls: list[JsonObject], index: int) -> list[JsonObject]:
    """Return tool calls with their arguments as objects.

    OpenAI writes them as a JSON string; templates apply ``tojson``, which would quote it again.
    """
    parsed = []
    for number, call in enumerate(calls):
        path = f"messages[{index}].tool_calls[{number}].function"
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("invalid_tool_call", "the tool call names no function.", path=path)
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict):
            raise RowError(
                "invalid_tool_call",
                "the arguments are no JSON object.",
                path=f"{path}.arguments",
                hint='Write them as a string that holds a JSON object, e.g. "{}".',
            )
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def require_content(message: ChatMessage, index: int) -> None:
    """Raise RowError if an assistant message that is to be learned says and calls nothing."""
    if not message.text.strip() and not message.tool_calls:
        raise RowError(
            "empty_content",
            "the assistant message is empty.",
            path=f"messages[{index}].content",
            hint="Write the answer that the model should learn, or remove the row.",
        )


def without_tools(what: str, path: str) -> RowError:
    """Return the error of a template that ignores tools; `what` says how."""
    return RowError(
        "template_without_tools",
        f"the base model's chat template does not support tools: {what}.",
        path=path,
        hint="Remove them, or use a base model whose template supports tools.",
    )
