"""Around every request: an id that client and log share, and errors that nobody caught."""

import time

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from models.errors import PayloadTooLargeError, TuneryError
from models.tables import new_id

log = structlog.get_logger(__name__)

_SORRY = "The service made an error; its log has the details under this request id."
_TOO_LARGE = "The body is larger than this service accepts."


class RequestId:
    """Adds ``x-request-id`` (the SDK shows it) and ``openai-processing-ms``, and logs one line.

    It is the outermost place that can still give OpenAI's body to an unexpected error, and to the
    plain text that FastAPI's own limit of the body answers with.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_id("req_")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["headers"] = {}  # what the routes want every answer to carry, refusals included
        reply = _Reply(send, request_id, state["headers"])
        before = structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, reply.send)
            if reply.withheld:
                error = PayloadTooLargeError(_TOO_LARGE)
                await error_response(error)(scope, receive, reply.pass_on)
        except Exception:
            log.exception("unexpected_error")
            if reply.status is not None:
                raise
            await error_response(TuneryError(_SORRY))(scope, receive, reply.pass_on)
        finally:
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=reply.status,
                seconds=round(reply.seconds, 4),
            )
            structlog.contextvars.reset_contextvars(**before)


class _Reply:
    """The response on its way out."""

    def __init__(self, send: Send, request_id: str, added: dict[str, str]) -> None:
        self.status: int | None = None
        self.withheld = False
        self._send = send
        self._request_id = request_id
        self._added = added
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    async def send(self, message: Message) -> None:
        """Pass a message on, but for a 413 that is not in OpenAI's form."""
        if message["type"] != "http.response.start":
            if not self.withheld:
                await self._send(message)
            return
        if message["status"] == 413:
            kind = MutableHeaders(scope=message).get("content-type", "")
            self.withheld = "json" not in kind
        if not self.withheld:
            await self.pass_on(message)

    async def pass_on(self, message: Message) -> None:
        """Pass a message on; the headers go with its start."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            added = {
                **self._added,
                "x-request-id": self._request_id,
                "x-content-type-options": "nosniff",
                "openai-processing-ms": str(round(1000 * self.seconds)),
            }
            pairs = [
                (name.encode("latin-1"), value.encode("latin-1")) for name, value in added.items()
            ]
            message["headers"] = [*message.get("headers", ()), *pairs]
        await self._send(message)
