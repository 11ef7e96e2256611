"""A validation split that is carved from the training file: seeded, frozen, free of leakage.

Which rows are held out follows from their content and the seed, not from their place in the file;
so the split stays when rows are shuffled or others are added, and rows that are alike
(``duplicates.likeness``) land on the same side.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def held_out(likenesses: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which rows are for validation.

    Args:
        likenesses: One number for each row, shape (rows,), dtype uint64.
        fraction: Share of the rows, between 0 and 1; at least one row if it is above 0, and never
            all of them.
        seed: Another seed holds out other rows.

    Returns:
        A mask, shape (rows,), dtype bool. Its share is exact but for rows that are alike.
    """
    order = _mixed(likenesses, seed)
    distinct = np.unique(order)
    if fraction <= 0 or len(distinct) < 2:
        return np.zeros(len(order), np.bool_)
    n_rows = min(max(1, round(fraction * len(order))), len(order) - 1)
    threshold = min(np.partition(order, n_rows - 1)[n_rows - 1], distinct[-2])
    return np.asarray(order <= threshold)


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Spread numbers evenly, differently for each seed.

    The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, OOPSLA 2014, figure 17).
    """
    salt = np.frombuffer(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), np.uint64)[0]
    with np.errstate(over="ignore"):
        mixed = (numbers ^ salt) + _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))
