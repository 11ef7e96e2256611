"""``/v1/chat/completions``, plain and streamed."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from api.deps import CallerDep, ServicesDep
from api.openai import stored, translate
from api.openai.answers import ChatAnswer
from api.openai.schemas import ChatRequest
from api.openai.serving import (
    CLIENT_CLOSED_REQUEST,
    resolve,
    sse_response,
    unless_disconnected,
)
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject
from models.domain.generation import Chunk, GenerateEvent

router = APIRouter(tags=["chat"], route_class=StrictJsonRoute)


@router.post("/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    """Continue a conversation with a base model, a fine-tuned model or a checkpoint."""
    model, url = await run_in_threadpool(resolve, services, caller, body.model)
    generate = translate.generate_request(body, model, request.state.request_id)
    events = services.meter.watch(
        caller.using(model.name), services.inference.generate(url, generate)
    )
    answer = ChatAnswer(body, n_choices=generate.sampling.n)
    # Of a stream the first event decides the status: errors before it are no stream yet.
    work = _begin(answer, events) if body.stream else _collect(answer, events)
    if not await unless_disconnected(request, work):
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def keep() -> None:
        if body.store:
            await run_in_threadpool(stored.keep, services, caller, body, answer.completion())

    if not body.stream:
        await keep()
        return JSONResponse(answer.completion())
    return sse_response(_stream(answer, events, keep))


async def _begin(answer: ChatAnswer, events: AsyncGenerator[GenerateEvent, None]) -> None:
    answer.take(await anext(events))


async def _collect(answer: ChatAnswer, events: AsyncGenerator[GenerateEvent, None]) -> None:
    async with aclosing(events):
        async for event in events:
            answer.take(event)


async def _stream(
    answer: ChatAnswer,
    events: AsyncGenerator[GenerateEvent, None],
    keep: Callable[[], Awaitable[None]],
) -> AsyncGenerator[JsonObject, None]:
    """Yield the chunks of an answer."""
    async with aclosing(events):
        for index in range(answer.n_choices):
            yield answer.chunk(index, {"role": "assistant", "content": ""})
        async for event in events:
            answer.take(event)
            if isinstance(event, Chunk):
                for body in answer.chunks(event):
                    yield body
        await keep()
        if answer.body.includes_usage:
            yield answer.usage_chunk()
