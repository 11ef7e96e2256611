"""One answer being generated: the tokens to feed, the cache, the text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from worker.inference.engine.errors import EngineError
from worker.inference.engine.params import Constraint, Sampling, TokenEvent, TokenLogprobs
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.sampler import Peak, Sampler, token_logprobs
from worker.inference.engine.stream import TextStream
from worker.inference.engine.transcript import Transcript

_SCORED_AT_ONCE = 64
"""Prompt tokens scored at once: a row of log-probabilities is as long as the vocabulary."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (not empty) to continue `n` times; choice i draws with ``sampling.seed + i``."""

    prompt: tuple[int, ...]
    sampling: Sampling
    n: int = 1
    lease: AdapterLease | None = None
    """On the adapter to use; the engine takes leases of its own. None is the base model."""
    constraint: Callable[[], Constraint] | None = None
    """Makes what each choice is held to; None lets the text be anything."""
    scores_prompt: bool = False
    """Whether ``sampling.logprobs`` is wanted of the prompt's tokens too."""


class Sequence:
    """The state of one choice of one request; only the engine's thread steps it.

    Args:
        request: What it is a choice of; ``sampling`` is its own.
        lease: Its own lease on its adapter, released by `end`; None for the base model.
        text: What turns its tokens into text.
        emit: Where its events go.
        constraint: What its text is held to; None lets it be anything.
    """

    def __init__(
        self,
        request: Request,
        lease: AdapterLease | None,
        text: TextStream,
        emit: Callable[[TokenEvent | EngineError], None],
        constraint: Constraint | None = None,
    ) -> None:
        self.tokens = list(request.prompt)
        self.n_fed = 0
        """Tokens that the model has seen: those in its cache."""
        self.n_cached: int | None = None
        """Prompt tokens whose states were there already; None until it runs."""
        self.overtaken = 0
        self.sampler = Sampler(request.sampling, request.prompt, constraint)
        self.scores_prompt = request.scores_prompt
        self.lease = lease
        self.emit = emit
        self.cache: DynamicCache | None = None
        self.has_row = False
        self.aborted = False
        self.ended = False
        self._prompt = request.prompt
        self._sampling = request.sampling
        self._transcript = Transcript(request.sampling, text)
        self._prompt_logprobs: list[TokenLogprobs] = []

    @property
    def adapter(self) -> str | None:
        return None if self.lease is None else self.lease.weights.digest

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_left(self) -> int:
        return self._sampling.max_tokens - self._transcript.n_tokens

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.n_fed

    def restart(self) -> None:
        """Let go of the cache: all tokens have to be fed again."""
        self.cache, self.has_row, self.n_fed = None, False, 0
        if self.scores_prompt:
            self._prompt_logprobs = []

    def score(self, logits: torch.Tensor) -> None:
        """Take `logits` [n, vocabulary] of the next `n` tokens of the prompt.

        A row tells how likely the token after its own was.
        """
        n_top = self._sampling.logprobs or 0
        for rows in logits.split(_SCORED_AT_ONCE):
            first = len(self._prompt_logprobs) + 1
            tokens = self._prompt[first : first + len(rows)]
            if tokens:  # of the prompt's last row: what it says is of the answer
                self._prompt_logprobs += token_logprobs(rows[: len(tokens)], tokens, n_top)

    def take(
        self, logits: torch.Tensor, stop_ids: frozenset[int], peak: Peak | None = None
    ) -> TokenEvent:
        """Draw a token from `logits` [vocabulary]; tell what text is final and if this is the end.

        `peak` is that of `logits` where it is known already.

        Raises:
            GenerationError: no token can be drawn.
        """
        scored = tuple(self._prompt_logprobs)
        self._prompt_logprobs = []
        if self._sampling.max_tokens == 0:
            return TokenEvent("", "length", 0, self.n_cached or 0, prompt_logprobs=scored)
        drawn = self.sampler.pick(logits, peak)
        self.tokens.append(drawn.token)
        is_end = drawn.token in stop_ids
        if not is_end:
            self.sampler.advance(drawn.token)
        text, reason, final = self._transcript.push(
            drawn, is_end=is_end, is_over=not is_end and self.sampler.is_over
        )
        return TokenEvent(
            text,
            reason,
            self._transcript.n_tokens,
            self.n_cached or 0,
            final,
            prompt_logprobs=scored,
        )

    def end(self) -> None:
        """Let go of the adapter and of the cache."""
        self.ended = True
        self.cache = None
        if self.lease is not None:
            self.lease.release()
