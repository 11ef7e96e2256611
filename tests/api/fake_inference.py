"""An inference server on a real port that says what a test tells it to say."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import uvicorn
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from models.domain.base import JsonObject
from models.domain.encoding import EncodeAnswer, EncodeRequest
from models.domain.generation import AdapterRef, Chunk, Finished, GenerateRequest, Started
from models.errors import TuneryError

STARTED = Started(prompt_tokens=7, system_fingerprint="fp_fake")
FINISHED = Finished(prompt_tokens=7, completion_tokens=2)
HELLO = [
    STARTED,
    Chunk(text="Hel"),
    Chunk(text="lo"),
    Chunk(text="", finish_reason="stop"),
    FINISHED,
]


class Cut(BaseModel):
    """Not an event: the connection breaks here."""


class Hold(BaseModel):
    """Not an event: the server says nothing more until the API closes the connection."""


class FakeInference:
    """Answers ``POST /generate`` with `events` or with `refusal`, and keeps what it was sent.

    ``POST /encode`` is answered with `encoding` for each input.
    ``POST /warm`` succeeds or is refused likewise.
    """

    def __init__(self) -> None:
        self.url = ""
        self.events: list[Any] = list(HELLO)
        self.refusal: tuple[int, bytes] | None = None
        self.requests: list[GenerateRequest] = []
        self.encoded: list[EncodeRequest] = []
        self.encoding: JsonObject = {"embedding": [0.6, 0.8]}
        self.warmed: list[AdapterRef] = []
        self.headers: list[dict[str, str]] = []
        self.holding = threading.Event()
        self.left = threading.Event()

    def refuse(self, error: TuneryError) -> None:
        self.refusal = (error.status_code, json.dumps({"error": error.to_dict()}).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/warm":
            await self._warm(receive, send)
            return
        assert (scope["method"], scope["path"]) in (("POST", "/generate"), ("POST", "/encode"))
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        if scope["path"] == "/encode":
            await self._encode(await _body(receive), send)
            return
        self.requests.append(GenerateRequest.model_validate_json(await _body(receive)))
        status, body = self.refusal or (200, b"")
        await send({"type": "http.response.start", "status": status, "headers": []})
        for event in [] if self.refusal else self.events:
            if isinstance(event, Cut):
                raise ConnectionAbortedError
            if isinstance(event, Hold):
                self.holding.set()
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.left.set()
                return
            line = event if isinstance(event, bytes) else event.model_dump_json().encode()
            await send({"type": "http.response.body", "body": line + b"\n", "more_body": True})
        await send({"type": "http.response.body", "body": body})

    async def _encode(self, body: bytes, send: Send) -> None:
        request = EncodeRequest.model_validate_json(body)
        self.encoded.append(request)
        answer = EncodeAnswer(
            results=[{**self.encoding, "n": at} for at, _ in enumerate(request.inputs)],
            prompt_tokens=7,
            system_fingerprint="fp_fake",
        )
        status, data = self.refusal or (200, answer.model_dump_json().encode())
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": data})

    async def _warm(self, receive: Receive, send: Send) -> None:
        self.warmed.append(AdapterRef.model_validate_json(await _body(receive)))
        status, body = self.refusal or (200, b"{}")
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message: JsonObject = dict(await receive())
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


@contextmanager
def running_fake() -> Iterator[FakeInference]:
    """Run a `FakeInference` in a thread; its `url` is set."""
    fake = FakeInference()
    with serving(fake, lifespan="off") as fake.url:
        yield fake


@contextmanager
def serving(app: ASGIApp, lifespan: Literal["on", "off"]) -> Iterator[str]:
    """Run an application in a thread on a free port; yields its URL."""
    config = uvicorn.Config(
        app, port=0, lifespan=lifespan, log_config=None, ws="none", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
