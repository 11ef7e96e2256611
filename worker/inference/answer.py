"""One request on its way through the engine, as an asynchronous stream of wire events."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from models.domain.generation import Chunk, Finished
from models.errors import InvalidRequestError, TuneryError, UnavailableError
from worker.inference.engine.errors import EngineClosedError, EngineError, RequestRefusedError
from worker.inference.engine.params import TokenEvent
from worker.inference.writer import ChunkWriter


class Answer:
    """Collects what the engine emits for the `n` choices of one request; made on an event loop.

    What nobody has read yet is one event a choice, so that a slow reader costs no more memory than
    the text that it has not read.
    """

    def __init__(
        self, *, n: int, prompt_tokens: int, system_fingerprint: str, writer: ChunkWriter
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.system_fingerprint = system_fingerprint
        self._n = n
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._unread: dict[int, TokenEvent] = {}
        self._error: EngineError | None = None
        self._news = asyncio.Event()

    def emit(self, index: int, event: TokenEvent | EngineError) -> None:
        """Take an event from the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, index, event)

    def _take(self, index: int, event: TokenEvent | EngineError) -> None:
        if isinstance(event, EngineError):
            self._error = self._error or event
        else:
            earlier = self._unread.get(index)
            self._unread[index] = event if earlier is None else _joined(earlier, event)
        self._news.set()

    async def events(self) -> AsyncIterator[Chunk | Finished]:
        """Yield chunks as they come, then `Finished` once every choice has ended.

        Raises:
            TuneryError: a choice broke, so the answer as a whole did.
        """
        left, completion_tokens, cached_tokens = self._n, 0, 0
        while left:
            await self._news.wait()
            self._news.clear()
            unread, self._unread = self._unread, {}
            for index, event in unread.items():
                if event.finish_reason is not None:
                    left -= 1
                    completion_tokens += event.n_tokens
                    cached_tokens = max(cached_tokens, event.n_cached)
                yield self._writer.chunk(index, event)
            if self._error is not None:
                raise _public_error(self._error)
        yield Finished(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=cached_tokens,
        )


def _joined(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    return replace(
        second,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
    )


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
    if isinstance(error, RequestRefusedError):
        return InvalidRequestError(str(error), param=error.param, code="unsupported_parameter")
    return TuneryError(
        f"Generating the answer failed: {error} The server's log tells more.",
        code="generation_failed",
    )
