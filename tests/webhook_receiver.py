"""A receiver of webhooks on a real port."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

from tests.api.fake_inference import serving

LOCAL = "127.0.0.0/8"


@dataclass
class Receiver:
    """Answers each request with the next of `answers`, then 204, and keeps what came."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.received.append((headers, body))
        status = self.answers.pop(0) if self.answers else 204
        extra = [(b"location", b"http://127.0.0.1:1/")] if status == 302 else []
        await send({"type": "http.response.start", "status": status, "headers": extra})
        await send({"type": "http.response.body", "body": b""})


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a `Receiver` in a thread; its `url` is set."""
    receiver = Receiver()
    with serving(receiver, lifespan="off") as receiver.url:
        yield receiver
