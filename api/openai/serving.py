"""What chat and text completions share: the way to a server, and the forms on the wire."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import orjson
import structlog
from fastapi import Request
from fastapi.responses import StreamingResponse

from api.deps import Caller
from api.errors import error_body
from api.services import Services
from models.domain.base import JsonObject
from models.errors import TuneryError
from models.registry import adapters, inference_servers
from models.registry.adapters import ResolvedModel

log = structlog.get_logger(__name__)

CLIENT_CLOSED_REQUEST = 499
_DISCONNECT_POLL_SECONDS = 0.25


def resolve(services: Services, caller: Caller, name: str) -> tuple[ResolvedModel, str]:
    """Return what a model name stands for, once for a request, and the server that has it."""
    with services.database.read() as session:
        model = adapters.resolve(session, caller.project_id, name)
        return model, inference_servers.for_base(session, model.base_model).url


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, None]) -> bool:
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


def usage_body(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> JsonObject:
    """Return OpenAI's ``usage``; cached tokens are part of the prompt's."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def sse_response(bodies: AsyncGenerator[JsonObject, None]) -> StreamingResponse:
    """Return a stream of server-sent events, closed with ``[DONE]``."""
    return StreamingResponse(
        _events(bodies),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _events(bodies: AsyncGenerator[JsonObject, None]) -> AsyncIterator[bytes]:
    """Yield server-sent events; a failure is an error event, never a silent end."""
    async with aclosing(bodies):
        try:
            async for body in bodies:
                yield _sse(body)
        except TuneryError as error:
            log.warning("stream_failed", code=error.code, error=error.message)
            yield _sse(error_body(error))
            return
        yield b"data: [DONE]\n\n"


def _sse(body: JsonObject) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
