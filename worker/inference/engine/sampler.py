"""Choosing the next token of one sequence."""

import secrets

import torch

from worker.inference.engine.errors import GenerationError
from worker.inference.engine.params import Sampling

_SEEDS = 2**63


class Sampler:
    """Draws the tokens of one sequence, with a generator of its own.

    The generator lives on the CPU, so that a seed means the same on every device.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator()
        seed = secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed % _SEEDS
        self._generator.manual_seed(seed)

    def pick(self, logits: torch.Tensor) -> int:
        """Return a token id for `logits` [vocabulary].

        Raises:
            GenerationError: a logit is NaN.
        """
        if bool(torch.isnan(logits).any()):
            raise GenerationError("The model computed NaN for the next token.")
        if self._temperature == 0:
            return int(logits.argmax())
        # Doubles, and the maximum off first: no temperature above 0 divides to Infinity or NaN.
        scores = logits.double().cpu()
        probabilities = torch.softmax((scores - scores.max()) / self._temperature, dim=-1)
        if self._top_p < 1:
            probabilities = _nucleus(probabilities, self._top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of tokens with mass `top_p` or more (arXiv 1904.09751)."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, kept)
