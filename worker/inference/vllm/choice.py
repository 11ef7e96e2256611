"""One answer that vLLM gives: its tokens come over HTTP and go out as events."""

import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import replace

from worker.inference.engine.errors import EngineError, GenerationError
from worker.inference.engine.params import FinishReason, TokenEvent, TokenLogprobs
from worker.inference.engine.sequence import Request
from worker.inference.engine.stream import Decode, TextStream
from worker.inference.engine.transcript import Transcript
from worker.inference.vllm.client import VllmClient
from worker.inference.vllm.wire import Piece, body_of, piece_of

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}

logger = logging.getLogger(__name__)


class Choice:
    """Choice `index` of a request, with a lease of its own on the adapter.

    Only the engine's thread runs it; `end` may be called from any.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        emit: Callable[[TokenEvent | EngineError], None],
        decode: Decode,
        stop_ids: Iterable[int],
    ) -> None:
        self.ended = False
        self.n_prompt = 0
        """Tokens of the prompt, once vLLM has read it; how many of them it had kept."""
        self.n_cached = 0
        self._request = request
        self._index = index
        self._emit = emit
        self._stop_ids = frozenset(stop_ids)
        self._lease = request.lease.share() if request.lease is not None else None
        sampling = request.sampling
        self._transcript = Transcript(sampling, TextStream(decode, sampling.stop))
        self._reason: FinishReason | None = None

    @property
    def adapter(self) -> str | None:
        return None if self._lease is None else self._lease.weights.digest

    @property
    def n_tokens(self) -> int:
        return self._transcript.n_tokens

    def end(self) -> None:
        """Let go of the adapter; nothing is emitted any more."""
        self.ended = True
        if self._lease is not None:
            self._lease.release()

    def fail(self, error: EngineError) -> None:
        """End with `error`, unless it has ended."""
        if not self.ended:
            self.end()
            self._send(error)

    async def run(self, client: VllmClient, base: str) -> None:
        """Ask vLLM and emit what comes; whatever goes wrong ends this answer and no other.

        Args:
            client: Of its server.
            base: The name of the base there.
        """
        try:
            await self._read(client, base)
        except EngineError as error:
            self.fail(error)
        except Exception as error:
            # The edge of one answer: vLLM said something that we do not understand, for example.
            logger.exception("An answer of vLLM failed.")
            self.fail(GenerationError(f"{type(error).__name__} while reading vLLM's answer."))

    async def _read(self, client: VllmClient, base: str) -> None:
        request = self._request
        n_prompt = len(request.prompt)
        if request.sampling.max_tokens == 0 and not request.scores_prompt:
            self._finish(TokenEvent("", "length", 0))
            return
        body = body_of(request, self._index, self._stop_ids, base)
        last: TokenEvent | None = None
        async with aclosing(client.stream(body)) as events:
            async for event in events:
                if self.ended:
                    return
                is_first = self.n_prompt == 0
                self.n_prompt = n_prompt
                echoed = n_prompt if is_first and request.scores_prompt else 0
                piece = piece_of(event, echoed, request.sampling.logprobs)
                if piece.cached_tokens is not None:
                    self.n_cached = piece.cached_tokens
                    continue
                if last is not None:
                    continue
                out = self._take(piece)
                if out.finish_reason is None:
                    if (out.text or out.prompt_logprobs) and not self.ended:
                        self._send(out)
                    continue
                last = out
                if piece.finish_reason is None:
                    break  # the end is ours; closing the stream tells vLLM
        if last is None:
            raise GenerationError("vLLM broke the answer off.")
        self._finish(last)

    def _take(self, piece: Piece) -> TokenEvent:
        """Return what a piece makes final; with a reason when it is the last."""
        text = ""
        logprobs: list[TokenLogprobs] = []
        reason: FinishReason | None = None
        drawn = piece.drawn if self._request.sampling.max_tokens else ()
        for token in drawn:
            new, reason, final = self._transcript.push(token, is_end=token.token in self._stop_ids)
            text, logprobs = text + new, [*logprobs, *final]
            if reason is not None:
                break
        if reason is None and piece.finish_reason is not None:
            if piece.finish_reason not in _REASONS:
                raise GenerationError(f"vLLM ended the answer with {piece.finish_reason!r}.")
            reason = _REASONS[piece.finish_reason]
            rest, final = self._transcript.finish(reason)
            text, logprobs = text + rest, [*logprobs, *final]
        return TokenEvent(
            text,
            reason,
            self.n_tokens,
            logprobs=tuple(logprobs),
            prompt_logprobs=piece.scored,
        )

    def _finish(self, event: TokenEvent) -> None:
        if not self.ended:
            # The adapter is free before anybody learns of the end.
            self.end()
            self._send(replace(event, n_cached=self.n_cached))

    def _send(self, event: TokenEvent | EngineError) -> None:
        try:
            self._emit(event)
        except Exception:
            # Somebody else's code: it must not stop the engine.
            logger.exception("The receiver of an answer failed; the answer ends.")
            self.end()
