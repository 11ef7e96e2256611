"""The plain types that go into an engine and come out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

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

    `n_tokens` counts all tokens drawn so far, the end token included.
    """

    text: str
    finish_reason: FinishReason | None
    n_tokens: int


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer of the base model that an adapter may change."""

    in_features: int
    out_features: int
    is_output: bool = False
    """True for the language-model head, which PEFT's ``all-linear`` leaves out."""


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One module's change: ``y += scale · B(A(x))``, `a` [r, in] and `b` [out, r] in float32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def to(self, device: torch.device) -> "LoraWeights":
        return LoraWeights(self.a.to(device), self.b.to(device), self.scale)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A checked adapter: its identity and, by full module path, what it adds."""

    digest: str
    modules: Mapping[str, LoraWeights]

    def to(self, device: torch.device) -> "AdapterWeights":
        return AdapterWeights(
            self.digest, {path: weights.to(device) for path, weights in self.modules.items()}
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """`references` holds, for each adapter in memory, how many leases on it are out."""

    alive: bool
    running: int
    waiting: int
    references: dict[str, int] = field(default_factory=dict)
