"""``Idempotency-Key`` on every POST under ``/v1``: repeated, a request takes effect once."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from api.services import Services
from models.errors import AuthenticationError, InvalidRequestError, TuneryError
from models.registry import idempotency, tenancy
from models.registry.idempotency import Answer

HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"
MAX_ANSWER_BYTES = 1024 * 1024
THREADS = 4
_Result = TypeVar("_Result")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class Idempotency:
    """Carries a request out once for each key of a project, and repeats its answer for a day.

    Answers that a retry may change (429 and from 500 on) and streams are not kept. A multipart body
    has another boundary at each try, so of such a request only its URL is compared.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._threads = CapacityLimiter(THREADS)

    async def _aside(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Run what asks the database in a thread that no route could be waiting for.

        Many claims that wait for the lock of one database would else take all threads from the
        request that holds it, until their patience ends.
        """
        return await to_thread.run_sync(function, *arguments, limiter=self._threads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _key_of(scope)
        if key is None:
            await self.app(scope, receive, send)
            return
        services = scope["app"].state.services
        assert isinstance(services, Services)
        try:
            if not _KEY.fullmatch(key):
                raise InvalidRequestError(
                    "An Idempotency-Key has 1 to 255 visible ASCII characters, e.g. a UUID.",
                    param="Idempotency-Key",
                )
            project_id = await self._aside(_project_of, services, scope)
        except AuthenticationError:
            await self.app(scope, receive, send)  # which says what is wrong with the key
            return
        except TuneryError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._once(scope, receive, send, _Claim(services, project_id, key))

    async def _once(self, scope: Scope, receive: Receive, send: Send, claim: "_Claim") -> None:
        url = f"{scope['path']}?{scope['query_string'].decode('latin-1')}\n"
        digest = hashlib.sha256(url.encode())
        if not Headers(scope=scope).get("content-type", "").startswith("multipart/"):
            limit = claim.services.settings.api.max_body_bytes
            receive = await _read_ahead(receive, limit, digest.update)
        try:
            before = await self._aside(claim.take, digest.hexdigest())
        except TuneryError as error:
            await error_response(error)(scope, receive, send)
            return
        if before is not None:
            await _replay(before, send)
            return
        answer = _Recorder(send)
        try:
            await self.app(scope, receive, answer.send)
        except Exception:
            # The transaction was rolled back. A request that is cancelled, as when the process
            # ends, keeps its claim instead: it may have been committed.
            await self._aside(claim.close, None)
            raise
        await self._aside(claim.close, answer.recorded())


@dataclass(frozen=True, slots=True)
class _Claim:
    services: Services
    project_id: str
    key: str

    def take(self, request_sha256: str) -> Answer | None:
        with self.services.database.write() as session:
            return idempotency.claim(session, self.project_id, self.key, request_sha256)

    def close(self, answer: Answer | None) -> None:
        with self.services.database.write() as session:
            if answer is None:
                idempotency.release(session, self.project_id, self.key)
            else:
                idempotency.settle(session, self.project_id, self.key, answer)


@dataclass
class _Recorder:
    """Passes an answer on and keeps a copy of it."""

    _send: Send
    _status: int = 500
    _content_type: str = ""
    _body: bytearray = field(default_factory=bytearray)
    _ended: bool = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._content_type = Headers(raw=message["headers"]).get("content-type", "")
        elif message["type"] == "http.response.body":
            if len(self._body) <= MAX_ANSWER_BYTES:
                self._body += message.get("body", b"")
            self._ended = not message.get("more_body", False)
        await self._send(message)

    def recorded(self) -> Answer | None:
        """Return the answer if it is to be repeated, else None."""
        again = self._status == 429 or self._status >= 500
        is_stream = self._content_type.startswith("text/event-stream")
        if again or is_stream or not self._ended or len(self._body) > MAX_ANSWER_BYTES:
            return None
        return Answer(self._status, self._content_type, bytes(self._body))


def _key_of(scope: Scope) -> str | None:
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return Headers(scope=scope).get(HEADER) if path.startswith("/v1/") else None


def _project_of(services: Services, scope: Scope) -> str:
    scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise AuthenticationError("An Idempotency-Key goes with a bearer key.")
    with services.database.read() as session:
        return tenancy.authenticate(session, secret.strip()).project_id


async def _read_ahead(receive: Receive, limit: int, update: Callable[[bytes], None]) -> Receive:
    """Read a body of at most `limit` bytes (and the message that exceeds it); return its replay.

    Of a body that is too large the rest is left to the application, which refuses it.
    """
    messages: list[Message] = []
    size = 0
    more = True
    while more and size <= limit:
        message = await receive()
        messages.append(message)
        body = message.get("body", b"")
        update(body)
        size += len(body)
        more = message.get("more_body", False)
    waiting = iter(messages)

    async def replay() -> Message:
        message = next(waiting, None)
        return await receive() if message is None else message

    return replay


async def _replay(answer: Answer, send: Send) -> None:
    message: Message = {"type": "http.response.start", "status": answer.status, "headers": []}
    headers = MutableHeaders(scope=message)
    headers["content-type"] = answer.content_type
    headers["content-length"] = str(len(answer.body))
    headers[REPLAYED] = "true"
    if answer.status == 409:
        headers["x-should-retry"] = "false"
    await send(message)
    await send({"type": "http.response.body", "body": answer.body})
