"""Chunks of the wire: names of tokens, offsets, echoed prompts, tool calls."""

import math

import pytest

from models.domain.generation import TokenLogprob, TopLogprob
from tests.worker.inference.conftest import Tokenizers
from worker.inference.engine.grammar import Vocabulary
from worker.inference.engine.params import TokenEvent, TokenLogprobs
from worker.inference.tool_stream import ToolStream
from worker.inference.writer import LEAST_LOGPROB, ChunkWriter, Echo
from worker.tool_syntax import HERMES


@pytest.fixture(scope="module")
def vocabulary(tokenizers: Tokenizers) -> Vocabulary:
    return Vocabulary(tokenizers[0], tokenizers[1].stop_ids)


def ids_of(tokenizers: Tokenizers, text: str) -> list[int]:
    return list(tokenizers[0].encode(text, add_special_tokens=False))


def test_a_token_has_text_bytes_and_alternatives(
    vocabulary: Vocabulary, tokenizers: Tokenizers
) -> None:
    [time], [people] = (ids_of(tokenizers, text) for text in (" time", " people"))
    scored = TokenLogprobs(time, -0.5, ((time, -0.5), (people, -math.inf)), offset=3)
    chunk = ChunkWriter(vocabulary).chunk(1, TokenEvent(" time", None, 1, logprobs=(scored,)))
    own = TopLogprob(text=" time", bytes=tuple(b" time"), logprob=-0.5)
    other = TopLogprob(text=" people", bytes=tuple(b" people"), logprob=LEAST_LOGPROB)
    assert (chunk.index, chunk.text) == (1, " time")
    assert chunk.logprobs == (
        TokenLogprob(text=" time", bytes=tuple(b" time"), logprob=-0.5, offset=3, top=(own, other)),
    )


def test_the_prompt_stands_before_each_answer_once(
    vocabulary: Vocabulary, tokenizers: Tokenizers
) -> None:
    prompt = "日本 tide"
    ids = ids_of(tokenizers, prompt)
    writer = ChunkWriter(vocabulary, echo=Echo(prompt, tuple(ids)))
    scores = tuple(TokenLogprobs(token, -1.0) for token in ids[1:])
    drawn = TokenLogprobs(ids[-1], -2.0, offset=0)
    first = TokenEvent("!", None, 1, logprobs=(drawn,), prompt_logprobs=scores)
    chunk = writer.chunk(0, first)
    assert chunk.text == prompt + "!"
    assert [each.logprob for each in chunk.logprobs] == [None, *[-1.0] * (len(ids) - 1), -2.0]
    assert b"".join(bytes(each.bytes) for each in chunk.logprobs[:-1]) == prompt.encode()
    offsets = [each.offset for each in chunk.logprobs]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[-1] == len(prompt)
    assert writer.chunk(0, TokenEvent("?", "stop", 2)).text == "?"
    assert writer.chunk(1, TokenEvent("", "length", 0)).text == prompt


def test_calls_leave_the_text_and_give_the_reason(vocabulary: Vocabulary) -> None:
    tools = [ToolStream(HERMES, frozenset({"f"})) for _ in range(2)]
    writer = ChunkWriter(vocabulary, tools)
    call = '<tool_call>{"name": "f", "arguments": {}}'
    chunk = writer.chunk(0, TokenEvent(call, "stop", 9))
    assert (chunk.text, chunk.finish_reason) == ("", "tool_calls")
    assert chunk.tool_calls[0].name == "f"
    assert "".join(delta.arguments for delta in chunk.tool_calls) == "{}"
    assert writer.chunk(1, TokenEvent("<tool", None, 1)).text == ""
    assert writer.chunk(1, TokenEvent("", "stop", 2)).text == "<tool"
    assert writer.chunk(1, TokenEvent("", "stop", 2)).finish_reason == "stop"


def test_a_call_that_was_cut_off_ended_by_length(vocabulary: Vocabulary) -> None:
    writer = ChunkWriter(vocabulary, [ToolStream(HERMES, frozenset({"f"}))])
    cut = TokenEvent('<tool_call>{"name": "f", "arguments": {"a', "length", 9)
    assert writer.chunk(0, cut).finish_reason == "length"
