"""The plain types that go into an engine and come out of it."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_tokens: Most tokens to generate, at least 1.
        temperature: 0 is greedy.
        top_p: Mass of the nucleus, in (0, 1]; 1 keeps every token.
        seed: Makes the draw repeatable; None draws anew each time.
        stop: Strings that end the text; none is empty, none is ever part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be at least 0, top_p above 0 and at most 1.")
        if "" in self.stop:
            raise ValueError("A stop string must not be empty.")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Text that became final; the last event of a sequence has a `finish_reason`.

    `n_tokens` counts all tokens drawn so far, the end token included; `n_cached` the prompt tokens
    that did not have to be computed, because a prompt before began with them.
    """

    text: str
    finish_reason: FinishReason | None
    n_tokens: int
    n_cached: int = 0


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer of the base model that an adapter may change."""

    in_features: int
    out_features: int
    is_output: bool = False
    """True for the language-model head, which PEFT's ``all-linear`` leaves out."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """`references` holds, for each adapter in memory, how many leases on it are out."""

    alive: bool
    running: int
    waiting: int
    references: dict[str, int] = field(default_factory=dict)
