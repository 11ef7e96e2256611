"""Chat templates: the programs, brought by base models, that write a conversation as text.

They come from strangers, so they run in ``worker.template_sandbox``. For the same conversation
the text is that of ``transformers``' ``apply_chat_template``.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from worker.row_error import RowError
from worker.template_sandbox import TemplateLimitError, TemplateSandbox, check_size, running

MAX_SOURCE = 1 << 20

DEFAULT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'tool' or message.tool_calls %}
{{ raise_exception('the default chat template has no tools') -}}
{% elif message.role == 'system' %}
{{ message.content + '\\n\\n' -}}
{% elif message.role == 'user' %}
{{ '### User:\\n' + message.content + '\\n\\n' -}}
{% else %}
{{ '### Assistant:\\n' + message.content + eos_token + '\\n\\n' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Assistant:\\n' -}}
{% endif %}
"""
"""For base models without a template: plain words, and no token that the model does not have."""


TEMPLATE_FAILURES = (
    TemplateError,  # raise_exception(…), undefined names, the sandbox and its limits
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template, being a program, can raise on a conversation that it was not written for."""


@contextmanager
def row_errors() -> Iterator[None]:
    """Raise what a template raises on a conversation as RowError."""
    try:
        yield
    except TemplateLimitError as error:
        raise RowError(
            "template_limit",
            f"the chat template was stopped: {error}.",
            path="messages",
            hint="Shorten the row, or use a base model with a simpler template.",
        ) from error
    except TEMPLATE_FAILURES as error:
        reason = str(error)[:200] or type(error).__name__
        raise RowError(
            "template_error",
            f"the chat template refuses this conversation: {reason}.".replace("..", "."),
            path="messages",
            hint="Check the order of the roles; templates want user and assistant in turn.",
        ) from error


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja source text.
        variables: Names that every rendering sees: ``bos_token``, ``eos_token`` and the like.

    Raises:
        TemplateError: the source is no Jinja, or longer than `MAX_SOURCE` characters.
    """

    def __init__(self, source: str, variables: Mapping[str, object]) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"its source has more than {MAX_SOURCE:,} characters")
        self.marks_answers = "endgeneration" in source
        """Whether the template says itself what the model writes (``{% generation %}``)."""
        self._template = TemplateSandbox().from_string(source)
        self._variables = {"bos_token": "", "eos_token": "", **variables}

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the conversation as the text that the model reads.

        Raises:
            One of TEMPLATE_FAILURES: the template refuses the conversation, or breaks a limit.
        """
        with running():
            return self._render(messages, tools, add_generation_prompt)

    def generations(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the half-open spans of its characters in ``generation`` blocks.

        Raises:
            One of TEMPLATE_FAILURES: as `render`.
        """
        # Digits that nobody can guess: no filter of a template changes them, no content has them.
        secret = str(secrets.randbelow(9 * 10**31) + 10**31)
        start, end = f"{secret}3", f"{secret}4"
        with running(marks=(start, end)):
            marked = self._render(messages, tools, False)
        text, *pieces = marked.split(start)
        spans = []
        for piece in pieces:
            inside, _, after = piece.partition(end)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + after
        return text, spans

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        pieces, size = [], 0
        for piece in self._template.generate(
            messages=[_with_reasoning(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        ):
            pieces.append(piece)
            size += len(piece)
            check_size(size)
        return "".join(pieces)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its reasoning under the second name that templates read as well."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}
