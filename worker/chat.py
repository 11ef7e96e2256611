"""The renderer: the only place that turns messages into token ids and a loss mask.

Training, evaluation, preview and serving all call it, so what a model saw in training is what it
is given when it serves. Three properties hold for every result:

- *Equal*: for ordinary text the ids are those of ``tokenizer.apply_chat_template``.
- *Proved*: the mask comes from no marker string. The prompt of an assistant turn, as it would be
  served, must be an exact prefix of the whole row's ids, or the row is refused.
- *Inert content*: a special token typed into a message (``<|im_end|>``) stays text.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from models.domain.base import JsonObject
from models.domain.rows import (
    ChatMessage,
    ChatRow,
    CompletionRow,
    Row,
    TextRow,
    template_messages,
)
from models.errors import InvalidRequestError
from worker.row_error import RowError, parsed_calls
from worker.token_guard import TokenGuard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_FAILURES = (
    TemplateError,  # raise_exception(…), undefined names, and what the sandbox forbids
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What a template, being a program, can raise on a conversation that it was not written for."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as token ids; ``trained[i]`` says that ``input_ids[i]`` is a target of the loss."""

    input_ids: list[int]
    trained: list[bool]

    @property
    def n_trained(self) -> int:
        return sum(self.trained)


@dataclass(frozen=True, slots=True)
class _Conversation:
    """Messages and tools as the template takes them; `guarded` if special tokens were masked."""

    turns: list[dict[str, Any]]
    tools: list[JsonObject] | None
    guarded: bool


class ChatRenderer:
    """Renders conversations with the chat template of one tokenizer.

    Args:
        tokenizer: A tokenizer whose chat template is the base model's own. A tokenizer without
            one is refused at the first use (code ``no_chat_template``).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._guard = TokenGuard(tokenizer, secret=str(secrets.randbelow(9 * 10**31) + 10**31))

    @cached_property
    def template_sha256(self) -> str:
        """The identity of the template: sha256, in hex, of its source text."""
        template = self._tokenizer.chat_template or ""
        source = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        return hashlib.sha256(source.encode()).hexdigest()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an assistant turn: the tokenizer's, and the chat template's."""
        ids = set()
        if self._tokenizer.eos_token_id is not None:
            ids.add(int(self._tokenizer.eos_token_id))
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        probe = _Conversation(turns, None, guarded=False)
        prompt = self._ids(probe, 1, add_generation_prompt=True)
        whole = self._ids(probe, 2)
        if whole[: len(prompt)] == prompt:
            last = self._guard.last_special(whole, len(prompt))
            if last is not None:
                ids.add(whole[last])
        return frozenset(ids)

    def prompt_ids(
        self, messages: list[ChatMessage], tools: list[JsonObject] | None = None
    ) -> list[int]:
        """Return the ids of `messages` followed by the opening of the assistant's answer.

        Raises:
            InvalidRequestError: the template refuses or would ignore a part of the conversation
                (``param`` is ``messages`` or ``tools``).
        """
        try:
            conversation = self._conversation(messages, tools)
            return self._ids(conversation, len(messages), add_generation_prompt=True)
        except RowError as error:
            where = f"{error.path}: " if error.path else ""
            raise InvalidRequestError(
                f"{where}{error.message} {error.hint}".rstrip(),
                param="tools" if error.path == "tools" else "messages",
                code=error.code,
            ) from error

    def render(self, row: Row) -> Rendered:
        """Return the ids of a row and which of them are trained.

        Of a conversation, every assistant turn is trained whose `weight` is not 0: from the first
        token after the served prompt through the end-of-turn token; the line break after it is
        not. Of a completion row it is the completion, of running text everything, each through the
        end-of-text token.

        Raises:
            RowError: the row cannot be rendered, its mask cannot be proved, or its form is none
                of these.
        """
        match row:
            case ChatRow():
                return self._render_chat(row)
            case CompletionRow():
                return self._render_text(row.prompt, row.completion)
            case TextRow():
                return self._render_text("", row.text)
        raise RowError("unsupported_form", f"a {row.form} row has no text to continue.")

    def _render_text(self, prompt: str, learned: str) -> Rendered:
        """Render text without a template: what is given first, and what is learned after it."""
        end = self._tokenizer.eos_token_id
        if end is None:
            raise RowError(
                "no_end_of_text",
                "the base model has no end-of-text token, so it would never learn to stop.",
                hint="Use a base model that has one.",
            )
        start = [each for each in self._tokenizer("")["input_ids"] if each != end]
        given = [*start, *self._plain_ids(prompt)]
        whole = [*start, *self._plain_ids(prompt + learned), int(end)]
        if whole[: len(given)] != given:
            raise RowError(
                "answer_merges_with_prompt",
                "the completion's first characters merge with the end of the prompt into one "
                "token.",
                path="completion",
                hint="Move the white space at the prompt's end to the start of the completion.",
            )
        return Rendered(whole, [index >= len(given) for index in range(len(whole))])

    def _plain_ids(self, text: str) -> list[int]:
        if self._guard.found_in(text):
            return self._guard.encode(str(self._guard.mask(text)))
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _render_chat(self, row: ChatRow) -> Rendered:
        conversation = self._conversation(row.messages, row.tools)
        whole = self._ids(conversation, len(row.messages))
        trained = [False] * len(whole)
        for index, message in enumerate(row.messages):
            if message.role == "assistant" and message.weight != 0:
                _require_content(message, index)
                start, end = self._span(conversation, whole, index)
                trained[start:end] = [True] * (end - start)
        rendered = Rendered(whole, trained)
        if not rendered.n_trained:
            raise RowError(
                "nothing_to_learn",
                "no assistant message of this row is trained.",
                path="messages",
                hint='Add an assistant message, or remove "weight": 0 from one.',
            )
        return rendered

    def _span(self, conversation: _Conversation, whole: list[int], index: int) -> tuple[int, int]:
        """Return the half-open range of the ids of assistant turn `index` that are trained."""
        path = f"messages[{index}]"
        if index == 0:
            raise RowError(
                "assistant_speaks_first",
                "the assistant speaks first, so there is no prompt to learn an answer to.",
                path=path,
                hint='Put a user message before it, or give it "weight": 0.',
            )
        prompt = self._ids(conversation, index, add_generation_prompt=True)
        turn = self._ids(conversation, index + 1)
        if turn[: len(prompt)] != prompt or whole[: len(prompt)] != prompt:
            raise self._no_prefix(conversation, index)
        if whole[: len(turn)] != turn:
            raise RowError(
                "template_not_prefix_safe",
                "the chat template renders this turn differently once more messages follow, so "
                "training on it would not match serving.",
                path=path,
                hint='Give it "weight": 0, or end the row here (one row for each answer).',
            )
        last = self._guard.last_special(turn, len(prompt))
        if (
            last is None
            or turn[last] not in self.stop_ids
            or str(self._tokenizer.decode(turn[last + 1 :])).strip()
        ):
            raise RowError(
                "no_end_of_turn",
                "the chat template does not close this turn with an end-of-turn token, so the "
                "model would never learn to stop.",
                path=path,
                hint="Use a base model whose chat template ends assistant turns.",
            )
        return len(prompt), last + 1

    def _no_prefix(self, conversation: _Conversation, index: int) -> RowError:
        prompt = self._text(conversation, index, add_generation_prompt=True)
        if self._text(conversation, len(conversation.turns)).startswith(prompt):
            return RowError(
                "answer_merges_with_prompt",
                "the answer's first characters merge with the end of the prompt into one token.",
                path=f"messages[{index}].content",
                hint="Remove white space at its start; if there is none, the template is at fault.",
            )
        return RowError(
            "template_not_prefix_safe",
            "the chat template renders the messages before this turn differently when they are "
            "served, so training on it would not match serving.",
            path=f"messages[{index}]",
            hint='Give the turn "weight": 0, or use one row for each answer.',
        )

    def _conversation(
        self, messages: list[ChatMessage], tools: list[JsonObject] | None
    ) -> _Conversation:
        if not messages:
            raise RowError("missing_field", "there is no message.", path="messages")
        for index, message in enumerate(messages):
            if message.content is None and not message.tool_calls:
                raise RowError(
                    "missing_content",
                    "the message has no content.",
                    path=f"messages[{index}].content",
                    hint="Write a string or a list of text parts.",
                )
        turns = template_messages(messages)
        for index, turn in enumerate(turns):
            if "tool_calls" in turn:
                turn["tool_calls"] = parsed_calls(turn["tool_calls"], index)
        guarded = self._guard.found_in(turns) or self._guard.found_in(tools)
        if guarded:
            turns, tools = self._guard.mask(turns), self._guard.mask(tools)
        conversation = _Conversation(turns, tools or None, guarded)
        self._refuse_ignored_tools(conversation)
        return conversation

    def _refuse_ignored_tools(self, conversation: _Conversation) -> None:
        """Raise RowError where leaving tools, calls or results out gives the very same text."""
        turns, tools = conversation.turns, conversation.tools
        if tools is not None and self._same_without(conversation, turns, None):
            raise _without_tools("it ignores the list of tools", "tools")
        called = False
        for index, turn in enumerate(turns):
            path = f"messages[{index}]"
            changed = None
            if turn.get("tool_calls"):
                called = True
                changed = {key: value for key, value in turn.items() if key != "tool_calls"}
                path += ".tool_calls"
            elif turn["role"] == "tool":
                if not called:
                    raise RowError(
                        "tool_without_call",
                        "a tool answers although no assistant message before it calls one.",
                        path=path,
                        hint='Put "tool_calls" into the assistant message before it.',
                    )
                changed = {**turn, "content": turn["content"] + "x"}
            if changed is not None:
                others = [*turns[:index], changed, *turns[index + 1 :]]
                if self._same_without(conversation, others, tools):
                    raise _without_tools("it ignores tool calls and their results", path)

    def _same_without(
        self,
        conversation: _Conversation,
        turns: list[dict[str, Any]],
        tools: list[JsonObject] | None,
    ) -> bool:
        text = self._text(conversation, len(turns))
        try:
            return text == self._text(_Conversation(turns, tools, False), len(turns))
        except RowError:
            return False  # the template asks for what was left out, so it knows it

    def _ids(
        self,
        conversation: _Conversation,
        n_turns: int,
        *,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        text = self._text(conversation, n_turns, add_generation_prompt=add_generation_prompt)
        if conversation.guarded:
            return self._guard.encode(text)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _text(
        self,
        conversation: _Conversation,
        n_turns: int,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        if not self._tokenizer.chat_template:
            raise RowError(
                "no_chat_template",
                "the base model has no chat template.",
                hint="Use an instruction-tuned base model.",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                conversation.turns[:n_turns],
                tools=list(conversation.tools) if conversation.tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except _TEMPLATE_FAILURES as error:
            reason = str(error)[:200] or type(error).__name__
            raise RowError(
                "template_error",
                f"the chat template refuses this conversation: {reason}.".replace("..", "."),
                path="messages",
                hint="Check the order of the roles; templates want user and assistant in turn.",
            ) from error
        return str(text)


def _require_content(message: ChatMessage, index: int) -> None:
    if not message.text.strip() and not message.tool_calls:
        raise RowError(
            "empty_content",
            "the assistant message is empty.",
            path=f"messages[{index}].content",
            hint="Write the answer that the model should learn, or remove the row.",
        )


def _without_tools(what: str, path: str) -> RowError:
    return RowError(
        "template_without_tools",
        f"the base model's chat template does not support tools: {what}.",
        path=path,
        hint="Remove them, or use a base model whose template supports tools.",
    )
