"""Dynamic masking for masked language modelling (Devlin et al., arXiv 1810.04805, section 3.1)."""

from collections.abc import Sequence

import torch

from worker.training.objectives.base import IGNORED

REPLACED_BY_MASK, REPLACED_BY_ANY = 0.8, 0.1
"""Of the chosen ids; the others stay as they are and are predicted all the same."""


def choose(
    maskable: torch.Tensor,
    n_chosen: int,
    words: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return which ids of one row are to be predicted, bool [T]; exactly `n_chosen` of them.

    Args:
        maskable: bool [T], at least `n_chosen` of them true.
        n_chosen: How many are chosen.
        words: The word of each id, int64 [T]: words are then chosen whole, but for the last one,
            of which only so many ids are as still fit.
        generator: Of the random numbers; torch's own if None.
    """
    places = maskable.nonzero()[:, 0]
    draw = torch.rand(len(places), generator=generator)
    if words is not None:
        _, word = words[places].unique(return_inverse=True)
        draw = torch.rand(int(word.max()) + 1, generator=generator)[word]
    order = draw.argsort(stable=True)
    chosen = torch.zeros_like(maskable)
    chosen[places[order[:n_chosen]]] = True
    return chosen


def corrupt(
    input_ids: torch.Tensor,
    chosen: torch.Tensor,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace 80 % of the chosen ids by the mask, 10 % by any id, and leave 10 % as they are.

    Args:
        input_ids: int64 [T].
        chosen: bool [T].
        mask_id: Of ``[MASK]``.
        vocab_size: Ids are below it.
        generator: Of the random numbers; torch's own if None.

    Returns:
        What the model reads, and what it has to predict (`IGNORED` where nothing is chosen).
    """
    draw = torch.rand(input_ids.shape, generator=generator)
    anything = torch.randint(vocab_size, input_ids.shape, generator=generator)
    corrupted = input_ids.clone()
    corrupted[chosen & (draw < REPLACED_BY_MASK)] = mask_id
    replaced = chosen & (draw >= REPLACED_BY_MASK) & (draw < REPLACED_BY_MASK + REPLACED_BY_ANY)
    corrupted[replaced] = anything[replaced]
    return corrupted, torch.where(chosen, input_ids, IGNORED)


def choose_all(
    maskable: torch.Tensor,
    lengths: Sequence[int],
    counts: Sequence[int],
    words: torch.Tensor | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return what `choose` does for rows one after another, bool [T]."""
    rows = maskable.split(list(lengths))
    parts = [None] * len(rows) if words is None else list(words.split(list(lengths)))
    return torch.cat(
        [
            choose(row, count, part, generator)
            for row, count, part in zip(rows, counts, parts, strict=True)
        ]
    )
