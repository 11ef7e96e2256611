"""The inference server's HTTP face: ``POST /generate``, ``/encode``, ``/warm``, ``/preview`` and
``GET /health``, ``/metrics``.

``/generate`` answers with one `GenerateEvent` a line. Until the first token there is a status to
set, so an error has its own; afterwards it is a ``failed`` event, and a stream never just ends.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.domain.encoding import EncodeRequest
from models.domain.generation import (
    AdapterRef,
    Chunk,
    Failed,
    Finished,
    GenerateRequest,
    PreviewRequest,
    Started,
)
from models.errors import AuthenticationError, InvalidRequestError, TuneryError
from worker.inference.metrics import CONTENT_TYPE
from worker.inference.service import InferenceService

NDJSON = "application/x-ndjson"
STALL_SECONDS = 60.0
"""How long a reader may take nothing before its request is given up."""

Body = TypeVar("Body", bound=BaseModel)

logger = structlog.get_logger(__name__)


def create_app(service: InferenceService, token: str) -> Starlette:
    """Return the application; every path but ``/health`` asks for ``Authorization: Bearer TOKEN``.

    Raises:
        ValueError: `token` is empty.
    """
    if not token:
        raise ValueError("An inference server needs a token.")

    async def warm(request: Request) -> Response:
        adapter = _parsed(AdapterRef, await request.body())
        await service.warm(adapter)
        return JSONResponse({"digest": adapter.digest, "resident": True})

    async def encode(request: Request) -> Response:
        wanted = _parsed(EncodeRequest, await request.body())
        return JSONResponse((await service.encode(wanted)).model_dump(mode="json"))

    async def preview(request: Request) -> Response:
        wanted = _parsed(PreviewRequest, await request.body())
        return JSONResponse(await service.preview(wanted))

    async def health(request: Request) -> Response:
        state = service.health()
        return JSONResponse(state, status_code=200 if state["status"] == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return Starlette(
        routes=[
            Route("/generate", GenerateEndpoint(service), methods=["POST"]),
            Route("/warm", warm, methods=["POST"]),
            Route("/preview", preview, methods=["POST"]),
            Route("/encode", encode, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        middleware=[Middleware(BearerAuth, token=token)],
        exception_handlers={TuneryError: _handle_error},
    )


class BearerAuth:
    """Lets a request through that carries the shared secret; compared in constant time."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = Request(scope).headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, self._expected):
                error = AuthenticationError("The inference server's token is missing or wrong.")
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class ReaderStalledError(Exception):
    """Whoever reads the answer has stopped to: nothing more can be sent."""


class GenerateEndpoint:
    """``POST /generate`` as one coroutine, so that whatever ends it also ends the sequences."""

    def __init__(self, service: InferenceService, stall_seconds: float = STALL_SECONDS) -> None:
        self._service = service
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        work = asyncio.create_task(self._respond(body, scope, receive, self._unless_stalled(send)))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()

    def _unless_stalled(self, send: Send) -> Send:
        async def patient(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stall_seconds):
                    await send(message)
            except TimeoutError:
                raise ReaderStalledError from None

        return patient

    async def _respond(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = _parsed(GenerateRequest, body)
            async with self._service.answer(request) as answer:
                events = answer.events()
                first = await anext(events)  # an error up to here has its own status
                await send(_head())
                await send(
                    _line(
                        Started(
                            prompt_tokens=answer.prompt_tokens,
                            system_fingerprint=answer.system_fingerprint,
                        )
                    )
                )
                await send(_line(first))
                await self._rest(events, request.request_id, send)
        except TuneryError as error:
            await error_response(error)(scope, receive, send)
            return
        except ReaderStalledError:
            logger.warning("reader_stalled", seconds=self._stall_seconds)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _rest(
        self, events: AsyncIterator[Chunk | Finished], request_id: str, send: Send
    ) -> None:
        try:
            async for event in events:
                await send(_line(event))
        except TuneryError as error:
            await send(_line(Failed(error=error.to_dict())))
        except ReaderStalledError:
            raise
        except Exception:
            # The edge of the stream: the reader must learn that it broke.
            logger.exception("stream_failed", request_id=request_id)
            broken = TuneryError("The answer broke off. The server's log tells more.")
            await send(_line(Failed(error=broken.to_dict())))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _head() -> Message:
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", NDJSON.encode()), (b"cache-control", b"no-store")],
    }


def _line(event: BaseModel) -> Message:
    body = event.model_dump_json().encode() + b"\n"
    return {"type": "http.response.body", "body": body, "more_body": True}


def _parsed(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise InvalidRequestError(f"{where}: {first['msg']}.", param=where) from error


def error_response(error: TuneryError) -> Response:
    """Render an error as the API understands it, with Retry-After where waiting helps."""
    headers: dict[str, Any] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse({"error": error.to_dict()}, status_code=error.status_code, headers=headers)


async def _handle_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, TuneryError):
        raise error
    return error_response(error)
