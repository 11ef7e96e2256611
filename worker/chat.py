"""The renderer: the only place that turns messages into token ids and a loss mask.

Training, evaluation, preview and serving all call it, so what a model saw in training is what it
is given when it serves. Three properties hold for every result:

- *Equal*: for ordinary text the ids are those of ``tokenizer.apply_chat_template``.
- *Proved*: the mask comes from no marker string. The prompt of an assistant turn, as it would be
  served, must be an exact prefix of the whole row, in characters and in ids. Where it is not, the
  template must mark the model's words itself (``{% generation %}``), or the row is refused.
- *Inert content*: a special token typed into a message (``<|im_end|>``) stays text.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

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
from worker.chat_template import DEFAULT_TEMPLATE, ChatTemplate, row_errors
from worker.masker import Masker, PreparedText, Rendered, Turn
from worker.row_error import RowError, parsed_calls, require_content, without_tools
from worker.token_guard import Encoded, TokenGuard
from worker.tool_syntax import PROBE_TOOLS, ToolSyntax, probe_question, probe_turn, syntax_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_PREFIX_SAFE = "template_not_prefix_safe"
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class _Conversation:
    """Messages and tools as the template takes them; `guarded` if special tokens were masked."""

    turns: list[dict[str, Any]]
    tools: list[JsonObject] | None
    guarded: bool


class ChatRenderer:
    """Renders conversations with the chat template of one tokenizer.

    Args:
        tokenizer: One with a chat template (``worker.base_models.load_tokenizer`` sees to it).

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template.")
        self._tokenizer = tokenizer
        self._guard = TokenGuard(tokenizer, secret=str(secrets.randbelow(9 * 10**31) + 10**31))
        self._templates: dict[str, ChatTemplate] = {}
        self._masker = Masker(self._guard)

    @property
    def template_source(self) -> str:
        """The template's text; JSON where a base model has several by name."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)

    @cached_property
    def template_sha256(self) -> str:
        """The identity of the template: sha256, in hex, of its source."""
        return hashlib.sha256(self.template_source.encode()).hexdigest()

    @property
    def uses_default_template(self) -> bool:
        """Whether the base model brought no template, so that ours stands in."""
        return bool(self._tokenizer.chat_template == DEFAULT_TEMPLATE)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer itself, e.g. for an encoder, which has no conversations."""
        return self._tokenizer

    @property
    def guard(self) -> TokenGuard:
        """What encodes plain text, in which special tokens are text."""
        return self._guard

    @cached_property
    def text_start(self) -> list[int]:
        """The tokens that running text starts with: often none, or a begin-of-text token."""
        end = self._tokenizer.eos_token_id
        return [int(each) for each in self._tokenizer("")["input_ids"] if each != end]

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
        prompt = self._text(probe, 1, add_generation_prompt=True)
        whole = self._text(probe, 2)
        if whole.startswith(prompt):
            encoding = self._masker.encode(whole, guarded=False)
            last = self._guard.last_special(encoding, 0, len(encoding.ids))
            if last is not None and encoding.offsets[last][0] >= len(prompt):
                ids.add(encoding.ids[last])
        return frozenset(ids)

    @cached_property
    def tool_syntax(self) -> ToolSyntax:
        """How the template writes the calls of tools."""
        return syntax_of([self._probed_calls(n) for n in (1, 2)], self._guard.split)

    def _probed_calls(self, n_calls: int) -> str | None:
        probe = _Conversation([probe_question(), probe_turn(n_calls)], PROBE_TOOLS, guarded=False)
        try:
            prompt = self._text(probe, 1, add_generation_prompt=True)
            whole = self._text(probe, 2)
        except RowError:  # it takes no tools, or no two calls at once
            return None
        answer = whole.removeprefix(prompt)
        for name in self._tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)):
            answer = answer.partition(name)[0]
        return answer if whole.startswith(prompt) else None

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue without a template, as completion rows begin."""
        guarded = self._guard.found_in(text)
        prepared = self._guard.swap(self._guard.mask(text)) if guarded else text
        return [*self.text_start, *self._masker.encode(prepared, guarded=guarded).ids]

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
            text = self._text(conversation, len(messages), add_generation_prompt=True)
            return self._masker.encode(text, guarded=conversation.guarded).ids
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
        [rendered] = self.render_all([row])
        if isinstance(rendered, RowError):
            raise rendered
        return rendered

    def render_all(self, rows: Sequence[Row]) -> list[Rendered | RowError]:
        """Return for each row what `render` returns or raises; on all cores, so rather faster."""
        texts = [_or_error(self._prepare, row) for row in rows]
        encodings: dict[int, Encoded] = {}
        for guarded in (False, True):
            chosen = {
                index: text.text
                for index, text in enumerate(texts)
                if not isinstance(text, RowError) and text.guarded is guarded
            }
            encoded = self._guard.encode(list(chosen.values()), guarded=guarded) if chosen else []
            encodings.update(zip(chosen, encoded, strict=True))
        return [
            text
            if isinstance(text, RowError)
            else _or_error(self._masker.mask, text, encodings[index], self.stop_ids)
            for index, text in enumerate(texts)
        ]

    def _prepare(self, row: Row) -> PreparedText:
        match row:
            case ChatRow():
                return self._prepare_chat(row)
            case CompletionRow():
                return self._prepare_text(row.prompt, row.completion)
            case TextRow():
                return self._prepare_text("", row.text)
        raise RowError("unsupported_form", f"a {row.form} row has no text to continue.")

    def _prepare_text(self, prompt: str, learned: str) -> PreparedText:
        """Prepare text without a template: what is given first, and what is learned after it."""
        end = self._tokenizer.eos_token_id
        if end is None:
            raise RowError(
                "no_end_of_text",
                "the base model has no end-of-text token, so it would never learn to stop.",
                hint="Use a base model that has one.",
            )
        whole = prompt + learned
        guarded = self._guard.found_in(whole)
        if guarded:
            prompt, whole = (self._guard.swap(self._guard.mask(each)) for each in (prompt, whole))
        turn = Turn(len(prompt), len(whole), "completion")
        return PreparedText(whole, guarded, [turn], before=self.text_start, after=[int(end)])

    def _prepare_chat(self, row: ChatRow) -> PreparedText:
        conversation = self._conversation(row.messages, row.tools)
        learned = []
        for index, message in enumerate(row.messages):
            if message.role == "assistant" and message.weight != 0:
                require_content(message, index)
                learned.append(index)
        if not learned:
            raise RowError(
                "nothing_to_learn",
                "no assistant message of this row is trained.",
                path="messages",
                hint='Add an assistant message, or remove "weight": 0 from one.',
            )
        whole = self._text(conversation, len(row.messages))
        try:
            turns = [self._turn(conversation, whole, index) for index in learned]
        except RowError as error:
            if error.code != NOT_PREFIX_SAFE or not self._template(conversation).marks_answers:
                raise
            turns = self._marked_turns(conversation, learned)
        return PreparedText(whole, conversation.guarded, turns)

    def _turn(self, conversation: _Conversation, whole: str, index: int) -> Turn:
        """Return where assistant turn `index` is, proved to follow the prompt as it is served."""
        path = f"messages[{index}]"
        if index == 0:
            raise RowError(
                "assistant_speaks_first",
                "the assistant speaks first, so there is no prompt to learn an answer to.",
                path=path,
                hint='Put a user message before it, or give it "weight": 0.',
            )
        prompt = self._text(conversation, index, add_generation_prompt=True)
        is_last = index + 1 == len(conversation.turns)
        turn = whole if is_last else self._text(conversation, index + 1)
        if not whole.startswith(prompt) or not turn.startswith(prompt):
            raise RowError(
                NOT_PREFIX_SAFE,
                "the chat template renders the messages before this turn differently when they "
                "are served, so training on it would not match serving.",
                path=path,
                hint='Give the turn "weight": 0, or use one row for each answer.',
            )
        if not whole.startswith(turn):
            raise RowError(
                NOT_PREFIX_SAFE,
                "the chat template renders this turn differently once more messages follow, so "
                "training on it would not match serving.",
                path=path,
                hint='Give it "weight": 0, or end the row here (one row for each answer).',
            )
        return Turn(len(prompt), len(turn), path)

    def _marked_turns(self, conversation: _Conversation, learned: list[int]) -> list[Turn]:
        """Return where the template itself says that the learned turns are."""
        text, spans = self._generations(conversation)
        speakers = [
            index for index, turn in enumerate(conversation.turns) if turn["role"] == "assistant"
        ]
        if len(spans) != len(speakers):
            raise RowError(
                NOT_PREFIX_SAFE,
                f"the chat template marks {len(spans)} generations for {len(speakers)} assistant "
                "messages.",
                path="messages",
                hint="Use one row for each answer.",
            )
        if conversation.guarded:
            spans = [
                (len(self._guard.swap(text[:start])), len(self._guard.swap(text[:end])))
                for start, end in spans
            ]
        return [
            Turn(start, end, f"messages[{index}]")
            for index, (start, end) in zip(speakers, spans, strict=True)
            if index in learned
        ]

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
            raise without_tools("it ignores the list of tools", "tools")
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
                    raise without_tools("it ignores tool calls and their results", path)

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

    def _template(self, conversation: _Conversation) -> ChatTemplate:
        source = self._tokenizer.get_chat_template(tools=conversation.tools)
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source, self._tokenizer.special_tokens_map)
        return self._templates[source]

    def _text(
        self, conversation: _Conversation, n_turns: int, *, add_generation_prompt: bool = False
    ) -> str:
        """Return the first `n_turns` as text, ready to encode."""
        with row_errors():
            text = self._template(conversation).render(
                conversation.turns[:n_turns],
                conversation.tools,
                add_generation_prompt=add_generation_prompt,
            )
        return self._guard.swap(text) if conversation.guarded else text

    def _generations(self, conversation: _Conversation) -> tuple[str, list[tuple[int, int]]]:
        with row_errors():
            return self._template(conversation).generations(conversation.turns, conversation.tools)


def _or_error(function: Callable[..., _Value], *arguments: object) -> _Value | RowError:
    try:
        return function(*arguments)
    except RowError as error:
        return error.with_traceback(None)  # its frames hold the very list that it is put into
