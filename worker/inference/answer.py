"""One request on its way through the engine, as an asynchronous stream of wire events."""

import asyncio
from collections.abc import AsyncIterator

from models.domain.generation import Chunk, Finished
from models.errors import TuneryError, UnavailableError
from worker.inference.engine.errors import EngineClosedError, EngineError
from worker.inference.engine.params import TokenEvent


class Answer:
    """Collects what the engine emits for the `n` choices of one request; made on an event loop."""

    def __init__(self, *, n: int, prompt_tokens: int, system_fingerprint: str) -> None:
        self.prompt_tokens = prompt_tokens
        self.system_fingerprint = system_fingerprint
        self._n = n
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, TokenEvent | EngineError]] = asyncio.Queue()

    def emit(self, index: int, event: TokenEvent | EngineError) -> None:
        """Take an event from the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    async def events(self) -> AsyncIterator[Chunk | Finished]:
        """Yield chunks as they come, then `Finished` once every choice has ended.

        Raises:
            TuneryError: a choice broke, so the answer as a whole did.
        """
        left, completion_tokens = self._n, 0
        while left:
            index, event = await self._queue.get()
            if isinstance(event, EngineError):
                raise _public_error(event)
            if event.finish_reason is not None:
                left -= 1
                completion_tokens += event.n_tokens
            yield Chunk(
                index=index,
                # A model can draw the byte 0, which no text of ours may hold.
                text=event.text.replace("\x00", "\ufffd"),
                finish_reason=event.finish_reason,
            )
        yield Finished(prompt_tokens=self.prompt_tokens, completion_tokens=completion_tokens)


def shutting_down() -> UnavailableError:
    """Return the error of a request that a stopping server can no longer answer."""
    return UnavailableError(
        "The inference server is shutting down. Send the request again.",
        code="server_shutting_down",
        retry_after=5,
    )


def _public_error(error: EngineError) -> TuneryError:
    if isinstance(error, EngineClosedError):
        return shutting_down()
    return TuneryError(
        f"Generating the answer failed: {error} The server's log tells more.",
        code="generation_failed",
    )
