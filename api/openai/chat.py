"""``/v1/chat/completions``, plain and streamed."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from api.deps import Caller, CallerDep, ServicesDep
from api.errors import error_body
from api.openai import stored, translate
from api.openai.schemas import ChatRequest
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject
from models.domain.generation import Chunk, Finished, GenerateEvent, Started
from models.errors import TuneryError
from models.registry import adapters, inference_servers
from models.registry.adapters import ResolvedModel
from models.tables import new_id

router = APIRouter(tags=["chat"], route_class=StrictJsonRoute)
log = structlog.get_logger(__name__)

CLIENT_CLOSED_REQUEST = 499
_DISCONNECT_POLL_SECONDS = 0.25


@router.post("/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    """Continue a conversation with a base model, a fine-tuned model or a checkpoint."""
    model, url = await run_in_threadpool(_resolve, services, caller, body.model)
    generate = translate.generate_request(body, model, request.state.request_id)
    events = services.meter.watch(
        caller.using(model.name), services.inference.generate(url, generate)
    )
    answer = _Answer(body, n_choices=generate.sampling.n)
    # Of a stream the first event decides the status: errors before it are no stream yet.
    work = _begin(answer, events) if body.stream else _collect(answer, events)
    if not await _unless_disconnected(request, work):
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def keep() -> None:
        if body.store:
            await run_in_threadpool(stored.keep, services, caller, body, answer.completion())

    if not body.stream:
        await keep()
        return JSONResponse(answer.completion())
    return StreamingResponse(
        _stream(answer, events, keep),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


def _resolve(services: Services, caller: Caller, name: str) -> tuple[ResolvedModel, str]:
    with services.database.read() as session:
        model = adapters.resolve(session, caller.project_id, name)
        return model, inference_servers.for_base(session, model.base_model).url


@dataclass
class _Choice:
    text: str = ""
    finish_reason: str | None = None


@dataclass
class _Answer:
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
            choice = self.choices[event.index]
            choice.text += event.text
            choice.finish_reason = event.finish_reason
        elif isinstance(event, Finished):
            self.usage = {
                "prompt_tokens": event.prompt_tokens,
                "completion_tokens": event.completion_tokens,
                "total_tokens": event.prompt_tokens + event.completion_tokens,
            }

    def _head(self, kind: str) -> JsonObject:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.fingerprint,
        }

    def completion(self) -> JsonObject:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._head("chat.completion") | {"choices": choices, "usage": self.usage}

    def chunk(self, index: int, delta: JsonObject, finish_reason: str | None = None) -> JsonObject:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        body = self._head("chat.completion.chunk") | {"choices": [choice]}
        return body | {"usage": None} if self.includes_usage else body

    def usage_chunk(self) -> JsonObject:
        return self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage}

    @property
    def includes_usage(self) -> bool:
        options = self.body.stream_options
        return bool(options and options.include_usage)


async def _begin(answer: _Answer, events: AsyncGenerator[GenerateEvent, None]) -> None:
    answer.take(await anext(events))


async def _collect(answer: _Answer, events: AsyncGenerator[GenerateEvent, None]) -> None:
    async with aclosing(events):
        async for event in events:
            answer.take(event)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, None]) -> bool:
    """Await `work`; cancel it when the client goes away. Returns whether it came to its end."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_DISCONNECT_POLL_SECONDS)
            if not task.done() and await request.is_disconnected():
                return False
        await task
        return True
    finally:
        task.cancel()


def _sse(body: JsonObject) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


async def _stream(
    answer: _Answer,
    events: AsyncGenerator[GenerateEvent, None],
    keep: Callable[[], Awaitable[None]],
) -> AsyncIterator[bytes]:
    """Yield server-sent events; a failure is an error event, never a silent end."""
    async with aclosing(events):
        for index in range(answer.n_choices):
            yield _sse(answer.chunk(index, {"role": "assistant", "content": ""}))
        try:
            async for event in events:
                answer.take(event)
                if not isinstance(event, Chunk):
                    continue
                if event.text:
                    yield _sse(answer.chunk(event.index, {"content": event.text}))
                if event.finish_reason:
                    yield _sse(answer.chunk(event.index, {}, event.finish_reason))
        except TuneryError as error:
            log.warning("stream_failed", code=error.code, error=error.message)
            yield _sse(error_body(error))
            return
        await keep()
        if answer.includes_usage:
            yield _sse(answer.usage_chunk())
        yield b"data: [DONE]\n\n"
