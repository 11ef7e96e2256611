"""Which prompts go through the model in one pass: plain bookkeeping, as the scheduler is."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

MOST_PADDING = 0.25
"""Padding that a shared pass may have, as a share of its tokens: a pass saves more than that."""


class Prompt(Protocol):
    """What has to be known of a sequence whose prompt is fed."""

    tokens: list[int]
    n_fed: int
    scores_prompt: bool

    @property
    def adapter(self) -> str | None:
        """The digest of its adapter; None for the base model."""


T = TypeVar("T", bound=Prompt)


def together(waiting: Sequence[tuple[T, int]], n_stored: Callable[[T], int], block: int) -> list[T]:
    """Return the first of `waiting`, and those of the others that share its pass.

    They are fed to their ends, go on from equally many tokens, have about one length, and none
    begins as another does: what begins alike is fed one after the other, since it is then stored.

    Args:
        waiting: Prompts, first come first, and how many tokens of each this step may feed.
        n_stored: Tells how many tokens of a prompt that nothing was fed of are stored.
        block: Tokens that are stored together.
    """
    first, _ = waiting[0]
    chosen: list[T] = []
    beginnings: set[tuple[str | None, tuple[int, ...]]] = set()
    behind = longest = total = 0
    for prompt, share in waiting:
        n_there = prompt.n_fed or n_stored(prompt)
        n = len(prompt.tokens) - n_there
        if prompt.scores_prompt or n > share:
            if prompt is first:
                return [first]
            continue
        beginning = prompt.adapter, tuple(prompt.tokens[n_there : n_there + block])
        wider = max(longest, n)
        padding = wider * (len(chosen) + 1) - (total + n)
        fits = n_there == behind and padding <= MOST_PADDING * (total + n)
        if prompt is not first and not (fits and beginning not in beginnings):
            continue
        chosen.append(prompt)
        beginnings.add(beginning)
        behind, longest, total = n_there, wider, total + n
    return chosen
