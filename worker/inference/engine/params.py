"""The plain types that go into an engine and come out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    The order: bias and penalties on the logits, the constraint, then, of the probabilities at the
    temperature, `top_k`, `top_p` and `min_p`. At temperature 0 the last three change nothing.

    Args:
        max_tokens: Most tokens to generate; 0 only scores the prompt.
        temperature: 0 is greedy.
        top_p: Mass of the nucleus, in (0, 1]; 1 keeps every token.
        seed: Makes the draw repeatable; None draws anew each time.
        stop: Strings that end the text; none is empty, none is ever part of it.
        top_k: Only the likeliest `top_k` tokens; 0 keeps every token.
        min_p: Only tokens at least `min_p` times as likely as the likeliest, in [0, 1].
        presence_penalty: Taken off the logit of every token drawn before.
        frequency_penalty: Taken off the logit of a token for each time it was drawn before.
        repetition_penalty: Above 0; above 1 makes tokens of prompt and answer less likely.
        logit_bias: What is added to the logit of a token, by id.
        logprobs: Report of each token its log-probability and those of the `logprobs` likeliest;
            None reports nothing.
        ignore_eos: Go on after end tokens, which are no text, to `max_tokens` or a stop string.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 0.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be at least 0, top_p above 0 and at most 1.")
        if self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise ValueError("top_k must be at least 0, min_p at least 0 and at most 1.")
        if self.repetition_penalty <= 0:
            raise ValueError("repetition_penalty must be above 0.")
        if "" in self.stop:
            raise ValueError("A stop string must not be empty.")


class Constraint(Protocol):
    """What one text may be: a grammar and how far the text has come in it."""

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing may follow it."""

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next: bool [its vocabulary], on the CPU.

        The end tokens are allowed where the text may end. Ids beyond are not allowed.
        """

    def advance(self, token: int) -> None:
        """Take `token`, which was allowed and is no end token."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token and how likely it was.

    The numbers are natural logarithms of what the model computed, before bias, penalties,
    constraint and temperature. `offset` is where the token begins in the text, in characters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, the first first."""
    offset: int = 0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Text that became final; the last event of a sequence has a `finish_reason`.

    `n_tokens` counts all tokens drawn so far, the end token included; `n_cached` the prompt tokens
    that needed no computing, because a prompt before began with them. `logprobs` is of the tokens
    that the text is of and of end tokens that were ignored, and `prompt_logprobs`, on the first
    event where they were asked for, of the prompt's tokens from the second one on.
    """

    text: str
    finish_reason: FinishReason | None
    n_tokens: int
    n_cached: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module of the base model that an adapter may change.

    A norm and a Transformer layer have as many outputs as inputs.
    """

    in_features: int
    out_features: int
    is_output: bool = False
    """True for the language-model head, which PEFT's ``all-linear`` leaves out."""
    kind: Literal["linear", "norm", "layer"] = "linear"
    has_bias: bool = False
    """Whether a norm has a bias; of linear layers nobody asks."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """`references` holds, for each adapter in memory, how many leases on it are out.

    `waiting_for_slot` are those of the waiting that others have passed for want of a slot. What
    begins with `n_`, the evictions and the preemptions count from the start.
    """

    alive: bool
    running: int
    waiting: int
    references: dict[str, int] = field(default_factory=dict)
    adapter_bytes: int = 0
    slots: int = 0
    distinct_adapters: int = 0
    waiting_for_slot: int = 0
    host_evictions: int = 0
    slot_evictions: int = 0
    preemptions: int = 0
    n_drawn: int = 0
    n_prompt: int = 0
    n_cached: int = 0
