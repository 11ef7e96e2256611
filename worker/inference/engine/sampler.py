"""Choosing the next token of one sequence."""

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from worker.inference.engine.errors import GenerationError
from worker.inference.engine.params import Constraint, Sampling, TokenLogprobs
from worker.kernels.operators import is_supported, largest

_SEEDS = 2**63
_FIRST_LOOK = 512
"""Tokens that are sorted at first; most nuclei are smaller than that."""


class Peak(NamedTuple):
    """The largest of a row of logits, NaN where one of them is, and the token that has it."""

    value: float
    token: int


def peaks(logits: torch.Tensor) -> list[Peak]:
    """Return the peak of each row of `logits` [n, vocabulary]: one look for all of them."""
    if logits.device.type == "cpu" and is_supported(logits.dtype):
        values, tokens = largest(logits)
    else:
        found = logits.max(dim=-1)
        values, tokens = found.values.tolist(), found.indices.tolist()
    return [Peak(*each) for each in zip(values, tokens, strict=True)]


class Sampler:
    """Draws the tokens of one sequence, with a generator of its own.

    The generator lives on the CPU, so that a seed means the same on every device and whatever
    other sequences share the batch.

    Args:
        sampling: How tokens are drawn.
        prompt: Token ids of the prompt, which the repetition penalty counts.
        constraint: What the text may be; None is anything.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._drawn: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._changes_logits = (
            bool(sampling.logit_bias)
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or sampling.repetition_penalty != 1
        )
        self._generator = torch.Generator()
        seed = secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed % _SEEDS
        self._generator.manual_seed(seed)

    @property
    def is_over(self) -> bool:
        """Whether the constraint lets nothing follow."""
        return self._constraint is not None and self._constraint.is_over

    def pick(self, logits: torch.Tensor, peak: Peak | None = None) -> TokenLogprobs:
        """Return a token for `logits` [vocabulary]; without `logprobs`, its logprob is 0.

        `peak` is that of `logits` where it is known already.

        Raises:
            GenerationError: a logit is NaN, or the constraint allows no token.
        """
        peak = peak or peaks(logits[None])[0]
        if math.isnan(peak.value):
            raise GenerationError("The model computed NaN for the next token.")
        is_plain = not self._changes_logits and self._constraint is None
        is_greedy = self._sampling.temperature == 0
        token = peak.token if is_greedy and is_plain else self._choose(logits)
        if self._sampling.logprobs is None:
            return TokenLogprobs(token, 0.0)
        [scored] = token_logprobs(logits[None], [token], self._sampling.logprobs)
        return scored

    def advance(self, token: int) -> None:
        """Take note of a token that has become part of the text."""
        if self._changes_logits:
            self._drawn[token] += 1
        if self._constraint is not None:
            self._constraint.advance(token)

    def _choose(self, logits: torch.Tensor) -> int:
        # Doubles, and the maximum off first: no temperature above 0 divides to Infinity or NaN.
        scores = logits.to("cpu", torch.float64, copy=True)
        if self._changes_logits:
            scores = self._changed(scores)
        if self._constraint is not None:
            scores = _only(scores, self._constraint.allowed())
        if self._sampling.temperature == 0:
            return int(scores.argmax())
        scores = (scores - scores.max()) / self._sampling.temperature
        return self._draw(torch.softmax(scores, dim=-1))

    def _changed(self, scores: torch.Tensor) -> torch.Tensor:
        """Apply bias and penalties to `scores` [vocabulary], which they own.

        Presence and frequency are OpenAI's formula (its API reference, "Frequency and presence
        penalties"), the repetition penalty is arXiv 1909.05858 §4.1, with negative logits
        multiplied as in its released code.
        """
        sampling = self._sampling
        if sampling.repetition_penalty != 1 and (self._seen or self._drawn):
            seen = torch.tensor(sorted(self._seen | self._drawn.keys()))
            values = scores[seen]
            factor = sampling.repetition_penalty
            scores[seen] = torch.where(values > 0, values / factor, values * factor)
        if self._drawn:
            tokens = torch.tensor(list(self._drawn))
            counts = torch.tensor(list(self._drawn.values()), dtype=scores.dtype)
            scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            tokens = torch.tensor(list(sampling.logit_bias))
            scores[tokens] += torch.tensor(list(sampling.logit_bias.values()), dtype=scores.dtype)
        return scores

    def _draw(self, probabilities: torch.Tensor) -> int:
        """Draw from `probabilities` [vocabulary], cut by top-k, top-p and min-p."""
        sampling = self._sampling
        if sampling.top_k or sampling.top_p < 1:
            probabilities = _cut(probabilities, sampling.top_k, sampling.top_p)
        if sampling.min_p > 0:  # arXiv 2407.01082 §3
            least = sampling.min_p * probabilities.max()
            probabilities = torch.where(probabilities >= least, probabilities, 0.0)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], n_top: int) -> list[TokenLogprobs]:
    """Return for each row of `logits` [n, vocabulary] its token's log-probability and the top.

    A token of probability 0 has minus infinity.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    index = torch.tensor(tokens, device=logits.device)
    own = logprobs.gather(1, index[:, None])[:, 0].tolist()
    top = logprobs.topk(min(n_top, logprobs.shape[1]), dim=1)
    rows = zip(tokens, own, top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprobs(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, ids, values in rows
    ]


def _only(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    if not bool(allowed.any()):
        raise GenerationError("The output format allows no token here.")
    kept = torch.full_like(scores, float("-inf"))
    size = min(len(scores), len(allowed))
    kept[:size] = torch.where(allowed[:size], scores[:size], float("-inf"))
    return kept


def _cut(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Zero all but the `top_k` likeliest (0: all) and, of these, the smallest set of mass `top_p`.

    The mass is that of the tokens that top-k left (arXiv 1904.09751 for the nucleus).
    """
    size = len(probabilities)
    looked_at = min(top_k or size, size)
    if not top_k:
        ordered, order = probabilities.topk(min(_FIRST_LOOK, size))
        if float(ordered.sum()) < top_p:
            ordered, order = probabilities.sort(descending=True, stable=True)
    else:
        ordered, order = probabilities.topk(looked_at)
        ordered = ordered / ordered.sum()
    before = ordered.cumsum(0) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, kept)
