"""One answer being generated: the tokens to feed, the cache, the text."""

from collections.abc import Callable

from transformers import DynamicCache

from worker.inference.engine.errors import EngineError
from worker.inference.engine.params import FinishReason, Sampling, TokenEvent
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.sampler import Sampler
from worker.inference.engine.stream import TextStream


class Sequence:
    """The state of one choice of one request; only the engine's thread steps it.

    Args:
        prompt: Token ids of the prompt.
        sampling: How its tokens are drawn.
        lease: Its own lease on its adapter, released by `end`; None for the base model.
        text: What turns its tokens into text.
        emit: Where its events go.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        sampling: Sampling,
        lease: AdapterLease | None,
        text: TextStream,
        emit: Callable[[TokenEvent | EngineError], None],
    ) -> None:
        self.tokens = list(prompt)
        self.n_fed = 0
        """Tokens that the model has seen: those in its cache."""
        self.n_cached: int | None = None
        """Prompt tokens whose states were there already; None until it runs."""
        self.overtaken = 0
        self.sampler = Sampler(sampling)
        self.lease = lease
        self.emit = emit
        self.cache: DynamicCache | None = None
        self.has_row = False
        self.aborted = False
        self.ended = False
        self._max_tokens = sampling.max_tokens
        self._text = text
        self._n_tokens = 0

    @property
    def adapter(self) -> str | None:
        return None if self.lease is None else self.lease.weights.digest

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_left(self) -> int:
        return self._max_tokens - self._n_tokens

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.n_fed

    def push(self, token: int, stop_ids: frozenset[int]) -> TokenEvent:
        """Take the token just drawn; the event tells what text is final and if this was the end."""
        self._n_tokens += 1
        self.tokens.append(token)
        text, reason = "", self._reason(token, stop_ids)
        if reason != "stop":
            text, stopped = self._text.push(token)
            reason = "stop" if stopped else reason
        if reason is not None:
            text += self._text.finish()
        return TokenEvent(text, reason, self._n_tokens, self.n_cached or 0)

    def _reason(self, token: int, stop_ids: frozenset[int]) -> FinishReason | None:
        if token in stop_ids:
            return "stop"
        return "length" if self._n_tokens >= self._max_tokens else None

    def end(self) -> None:
        """Let go of the adapter and of the cache."""
        self.ended = True
        self.cache = None
        if self.lease is not None:
            self.lease.release()
