"""A chat answer as it grows, and its two forms on the wire: whole, and in chunks."""

import time
from dataclasses import dataclass, field
from typing import Any

from api.openai.schemas import ChatRequest
from api.openai.serving import usage_body
from models.domain.base import JsonObject
from models.domain.generation import (
    Chunk,
    Finished,
    GenerateEvent,
    Started,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from models.tables import new_id


@dataclass
class _Choice:
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[JsonObject] = field(default_factory=list)
    calls: list[JsonObject] = field(default_factory=list)

    def take(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.finish_reason = chunk.finish_reason
        self.logprobs += map(_logprob_body, chunk.logprobs)
        for delta in chunk.tool_calls:
            if delta.index == len(self.calls):
                self.calls.append(_call_body(delta) | {"type": "function"})
            else:
                self.calls[delta.index]["function"]["arguments"] += delta.arguments

    def message(self) -> JsonObject:
        message: JsonObject = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message |= {"content": self.text or None, "tool_calls": self.calls}
        return message


@dataclass
class ChatAnswer:
    """What is known of an answer so far, and its two forms on the wire."""

    body: ChatRequest
    n_choices: int
    id: str = field(default_factory=lambda: new_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""
    usage: JsonObject | None = None
    choices: list[_Choice] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [_Choice() for _ in range(self.n_choices)]

    def take(self, event: GenerateEvent) -> None:
        if isinstance(event, Started):
            self.fingerprint = event.system_fingerprint
        elif isinstance(event, Chunk):
            self.choices[event.index].take(event)
        elif isinstance(event, Finished):
            self.usage = usage_body(
                event.prompt_tokens, event.completion_tokens, event.cached_tokens
            )

    def _head(self, kind: str) -> JsonObject:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.fingerprint,
        }

    def _logprobs(self, logprobs: list[JsonObject]) -> JsonObject | None:
        return {"content": logprobs, "refusal": None} if self.body.logprobs else None

    def completion(self) -> JsonObject:
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._head("chat.completion") | {"choices": choices, "usage": self.usage}

    def chunk(
        self,
        index: int,
        delta: JsonObject,
        finish_reason: str | None = None,
        logprobs: list[JsonObject] | None = None,
    ) -> JsonObject:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        body = self._head("chat.completion.chunk") | {"choices": [choice]}
        return body | {"usage": None} if self.body.includes_usage else body

    def chunks(self, event: Chunk) -> list[JsonObject]:
        """Return what one event is in a stream."""
        logprobs = list(map(_logprob_body, event.logprobs))
        bodies = []
        if event.text or logprobs:
            bodies.append(self.chunk(event.index, {"content": event.text}, logprobs=logprobs))
        for call in event.tool_calls:
            delta = {"index": call.index, **_call_body(call)}
            if call.id is not None:
                delta["type"] = "function"
            bodies.append(self.chunk(event.index, {"tool_calls": [delta]}))
        if event.finish_reason:
            bodies.append(self.chunk(event.index, {}, event.finish_reason))
        return bodies

    def usage_chunk(self) -> JsonObject:
        return self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage}


def _call_body(delta: ToolCallDelta) -> JsonObject:
    """Return a part of a call; only the first has id and name."""
    function: JsonObject = {"arguments": delta.arguments}
    if delta.id is None:
        return {"function": function}
    return {"id": delta.id, "function": {"name": delta.name, **function}}


def _logprob_body(token: TokenLogprob) -> JsonObject:
    def body(each: TokenLogprob | TopLogprob) -> dict[str, Any]:
        return {"token": each.text, "bytes": list(each.bytes), "logprob": each.logprob}

    return body(token) | {"top_logprobs": [body(each) for each in token.top]}
