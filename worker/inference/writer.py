"""From the engine's events to the wire's chunks: tool calls, log-probabilities, the prompt."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from models.domain.generation import Chunk, TokenLogprob, ToolCallDelta, TopLogprob
from worker.inference.engine.grammar import Vocabulary
from worker.inference.engine.params import TokenEvent, TokenLogprobs
from worker.inference.tool_stream import ToolStream

LEAST_LOGPROB = -9999.0
"""OpenAI's number for "very unlikely": JSON has no minus infinity."""


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt, to be put before each answer."""

    text: str
    tokens: tuple[int, ...]


class ChunkWriter:
    """Writes the chunks of one request's choices.

    Args:
        vocabulary: Names the tokens of log-probabilities; loaded already where there are any.
        tools: For each choice what finds its tool calls; empty where there are no tools.
        echo: The prompt where it was asked for.
    """

    def __init__(
        self, vocabulary: Vocabulary, tools: Sequence[ToolStream] = (), echo: Echo | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self._tools = tools
        self._echo = echo
        self._begun: set[int] = set()

    def chunk(self, index: int, event: TokenEvent) -> Chunk:
        """Return what `event` of choice `index` is on the wire."""
        # A model can draw the byte 0, which no text of ours may hold.
        text, reason = event.text.replace("\x00", "\ufffd"), event.finish_reason
        logprobs = [self._logprob(each, self._shift(each)) for each in event.logprobs]
        calls: tuple[ToolCallDelta, ...] = ()
        if self._tools:
            tools = self._tools[index]
            text, calls = tools.push(text)
            if reason is not None:
                rest, more = tools.finish()
                text, calls = text + rest, (*calls, *more)
        if self._echo is not None and index not in self._begun:
            text = self._echo.text + text
            if event.prompt_logprobs:
                logprobs = [*self._prompt(self._echo, event.prompt_logprobs), *logprobs]
        self._begun.add(index)
        called = bool(self._tools) and self._tools[index].n_calls > 0
        return Chunk(
            index=index,
            text=text,
            tool_calls=calls,
            logprobs=tuple(logprobs),
            finish_reason="tool_calls" if called and reason == "stop" else reason,
        )

    def _shift(self, scored: TokenLogprobs) -> int:
        return scored.offset + (len(self._echo.text) if self._echo is not None else 0)

    def _prompt(self, echo: Echo, scores: Iterable[TokenLogprobs]) -> Iterable[TokenLogprob]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offset = 0
        for token, scored in zip(echo.tokens, (None, *scores), strict=True):
            raw = self._vocabulary.bytes_of(token)
            at = min(offset, len(echo.text))
            if scored is None:
                yield TokenLogprob(
                    text=raw.decode(errors="replace"), bytes=tuple(raw), logprob=None, offset=at
                )
            else:
                yield self._logprob(scored, at)
            offset += len(decoder.decode(raw))

    def _logprob(self, scored: TokenLogprobs, offset: int) -> TokenLogprob:
        own = self._top(scored.token, scored.logprob)
        return TokenLogprob(
            text=own.text,
            bytes=own.bytes,
            logprob=own.logprob,
            offset=offset,
            top=tuple(self._top(token, value) for token, value in scored.top),
        )

    def _top(self, token: int, logprob: float) -> TopLogprob:
        raw = self._vocabulary.bytes_of(token)
        return TopLogprob(
            text=raw.decode(errors="replace"),
            bytes=tuple(raw),
            logprob=max(logprob, LEAST_LOGPROB),
        )
