"""``/v1/completions``: texts continued as they are, without a chat template."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from anyio import create_memory_object_stream
from anyio.streams.memory import MemoryObjectSendStream
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from api.deps import CallerDep, ServicesDep
from api.openai import translate
from api.openai.schemas import CompletionRequest
from api.openai.serving import (
    CLIENT_CLOSED_REQUEST,
    resolve,
    sse_response,
    unless_disconnected,
    usage_body,
)
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject
from models.domain.generation import Chunk, Finished, GenerateEvent, Started, TokenLogprob
from models.tables import new_id

router = APIRouter(tags=["completions"], route_class=StrictJsonRoute)

AT_A_TIME = 8
"""Prompts of one request that are under way together; the engine's places are for everybody."""

Events = AsyncGenerator[GenerateEvent, None]


@router.post("/completions")
async def create_completion(
    body: CompletionRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    """Continue texts with a base model, a fine-tuned model or a checkpoint."""
    model, url = await run_in_threadpool(resolve, services, caller, body.model)
    requests = translate.completion_requests(body, model, request.state.request_id)
    answer = _Answer(body, len(requests), requests[0].sampling.n)
    user = caller.using(model.name)
    streams = [
        services.meter.watch(user, services.inference.generate(url, each)) for each in requests
    ]
    if not body.stream:
        if not await unless_disconnected(request, _collect(answer, streams)):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(answer.completion())
    # The first event decides the status: errors before it are no stream yet.
    if not await unless_disconnected(request, answer.begin(streams[0])):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return sse_response(_stream(answer, streams))


@dataclass
class _Choice:
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the drawn tokens; what `best_of` ranks by."""
        known = [each.logprob for each in self.logprobs if each.logprob is not None]
        return sum(known) / len(known) if known else 0.0


@dataclass
class _Answer:
    """What is known of the answers to all prompts; choice i of prompt p is number ``p·n + i``."""

    body: CompletionRequest
    n_prompts: int
    n_drawn: int
    id: str = field(default_factory=lambda: new_id("cmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""
    finished: list[Finished] = field(default_factory=list)
    choices: list[_Choice] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [_Choice() for _ in range(self.n_prompts * self.n_drawn)]

    async def begin(self, events: Events) -> None:
        self.take(0, await anext(events))

    def take(self, prompt: int, event: GenerateEvent) -> None:
        if isinstance(event, Started):
            self.fingerprint = event.system_fingerprint
        elif isinstance(event, Finished):
            self.finished.append(event)
        elif isinstance(event, Chunk):
            choice = self.choices[prompt * self.n_drawn + event.index]
            choice.text += event.text
            choice.finish_reason = event.finish_reason
            choice.logprobs += event.logprobs

    def _head(self) -> JsonObject:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.fingerprint,
        }

    def _choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: list[TokenLogprob]
    ) -> JsonObject:
        return {
            "index": index,
            "text": text,
            "logprobs": None if self.body.logprobs is None else _logprobs_body(logprobs),
            "finish_reason": finish_reason,
        }

    def _usage(self) -> JsonObject:
        return usage_body(
            sum(each.prompt_tokens for each in self.finished),
            sum(each.completion_tokens for each in self.finished),
            sum(each.cached_tokens for each in self.finished),
        )

    def completion(self) -> JsonObject:
        kept: list[_Choice] = []
        for start in range(0, len(self.choices), self.n_drawn):
            drawn = self.choices[start : start + self.n_drawn]
            if self.n_drawn > (n := self.body.n or 1):  # best_of
                drawn = sorted(drawn, key=lambda each: each.mean_logprob, reverse=True)[:n]
            kept += drawn
        choices = [
            self._choice(index, each.text, each.finish_reason, each.logprobs)
            for index, each in enumerate(kept)
        ]
        return self._head() | {"choices": choices, "usage": self._usage()}

    def chunk(self, prompt: int, event: Chunk) -> JsonObject:
        index = prompt * self.n_drawn + event.index
        choice = self._choice(index, event.text, event.finish_reason, list(event.logprobs))
        body = self._head() | {"choices": [choice]}
        return body | {"usage": None} if self.body.includes_usage else body

    def usage_chunk(self) -> JsonObject:
        return self._head() | {"choices": [], "usage": self._usage()}


def _logprobs_body(tokens: list[TokenLogprob]) -> JsonObject:
    """Return OpenAI's older form: four lists, side by side."""
    return {
        "tokens": [each.text for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [
            None if each.logprob is None else {top.text: top.logprob for top in each.top}
            for each in tokens
        ],
        "text_offset": [each.offset for each in tokens],
    }


async def _collect(answer: _Answer, streams: list[Events]) -> None:
    async with aclosing(_merged(streams)) as merged:
        async for prompt, event in merged:
            answer.take(prompt, event)


async def _stream(answer: _Answer, streams: list[Events]) -> AsyncGenerator[JsonObject, None]:
    async with aclosing(_merged(streams)) as merged:
        async for prompt, event in merged:
            answer.take(prompt, event)
            if isinstance(event, Chunk):
                yield answer.chunk(prompt, event)
    if answer.body.includes_usage:
        yield answer.usage_chunk()


async def _merged(streams: list[Events]) -> AsyncGenerator[tuple[int, GenerateEvent], None]:
    """Yield the events of all streams as they come, `AT_A_TIME` streams together.

    Raises:
        TuneryError: the first that any of them raises; the others are closed.
    """
    sender, receiver = create_memory_object_stream[tuple[int, GenerateEvent]](AT_A_TIME)
    free = asyncio.Semaphore(AT_A_TIME)

    async def read(index: int, events: Events, own: MemoryObjectSendStream[Any]) -> None:
        async with own, free, aclosing(events):
            async for event in events:
                await own.send((index, event))

    tasks = [
        asyncio.create_task(read(index, events, sender.clone()))
        for index, events in enumerate(streams)
    ]
    sender.close()
    try:
        async with receiver:
            async for item in receiver:
                yield item
                for task in tasks:
                    if task.done():
                        task.result()
        for task in tasks:
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
