"""What goes to vLLM's ``/v1/completions`` and comes from it, as plain values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from worker.inference.engine.errors import RequestRefusedError
from worker.inference.engine.grammar import Grammar
from worker.inference.engine.params import TokenLogprobs
from worker.inference.engine.sequence import Request

BASE = "base"
"""The base model's name in vLLM; adapters are there under their digests, which are never this."""

ZERO = "zero"
"""The name of an adapter that changes nothing (`adapters.Links.add_zero`)."""

_PREFIX = "token_id:"
_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a stream brings.

    Without log-probabilities asked for, those of `drawn` are 0. `scored` is of the prompt's tokens
    from the second one on. `cached_tokens` comes with the last piece.
    """

    drawn: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    scored: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int | None = None


def body_of(
    request: Request, index: int, stop_ids: Iterable[int], base: str = BASE
) -> dict[str, Any]:
    """Return the body that asks for choice `index` of `request`, of `base` if of no adapter.

    Nothing is left to the defaults of vLLM, which come from the model's files.

    Raises:
        RequestRefusedError: its constraint is not one that can be written down.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": base if request.lease is None else request.lease.weights.digest,
        "prompt": list(request.prompt),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()},
        "stop": list(sampling.stop),
        "stop_token_ids": [] if sampling.ignore_eos else sorted(stop_ids),
        "ignore_eos": sampling.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if sampling.seed is not None:
        # Of negative seeds one means "none" to vLLM.
        body["seed"] = (sampling.seed + index) % _SEEDS
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        if request.scores_prompt:
            body["echo"] = True
    if request.constraint is not None:
        if not isinstance(request.constraint, Grammar):
            raise RequestRefusedError("vLLM follows grammars only.", "response_format")
        body["structured_outputs"] = {"grammar": request.constraint.lark}
    return body


def piece_of(event: Mapping[str, Any], n_prompt: int, n_top: int | None) -> Piece:
    """Read one event of a stream.

    Args:
        event: As vLLM sent it; not an error.
        n_prompt: How many tokens of the prompt it begins with, of which only scores are wanted.
        n_top: How many of the likeliest tokens each token brings; None where none was asked for.
    """
    if not event["choices"]:
        details = event["usage"].get("prompt_tokens_details") or {}
        return Piece(cached_tokens=details.get("cached_tokens") or 0)
    [choice] = event["choices"]
    tokens = choice.get("token_ids") or []
    if n_top is None:
        drawn = tuple(TokenLogprobs(token, 0.0) for token in tokens)
        return Piece(drawn, choice.get("finish_reason"))
    logprobs = choice["logprobs"]
    entries = list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
    named = [int(name.removeprefix(_PREFIX)) for name in logprobs["tokens"]]
    both = [
        TokenLogprobs(token, own, _likeliest(top, n_top))
        for token, (own, top) in zip(named, entries, strict=True)
        if own is not None  # the prompt's first token
    ]
    n_scored = max(0, n_prompt - 1)
    return Piece(tuple(both[n_scored:]), choice.get("finish_reason"), tuple(both[:n_scored]))


def _likeliest(top: Mapping[str, float], n_top: int) -> tuple[tuple[int, float], ...]:
    # vLLM adds the token itself where it is not among them.
    pairs = [(int(name.removeprefix(_PREFIX)), value) for name, value in top.items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:n_top])
