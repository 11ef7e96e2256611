"""Causal attention within rows, forward and backward: on a CPU in one of two ways.

The probabilities, which of all that is kept would grow with the square of a row's length, are made
again in the backward pass.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from worker.kernels import causal, products
from worker.kernels.team import bits_of
from worker.kernels.training import (
    Rows,
    Turns,
    causal_softmax_,
    causal_softmax_back_,
    join_heads,
    split_heads,
)
from worker.training.packed import pool
from worker.training.packed.layout import Layout

EXPLICIT_UP_TO = 1024
"""Longest row, in tokens, for which the whole matrix of probabilities is made."""


class Attention(ABC):
    """Causal attention of all rows of a pass."""

    longest: ClassVar[int]
    """Of rows that are taken, in tokens."""

    @staticmethod
    @abstractmethod
    def attend(
        projected: Sequence[torch.Tensor],
        turns: Turns | None,
        scale: float,
        rows: Layout,
        output: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Compute softmax(s·QKᵀ)·V of each row; the G = H / K queries of a key head share it.

        Args:
            projected: Queries [T, H, D], keys and values [T, K, D]; may be used up.
            turns: Positions that are put into queries and keys, or None if they are there.
            scale: s.
            rows: Which.
            output: [T, H, D], is filled.

        Returns:
            What `attend_back` needs.
        """

    @staticmethod
    @abstractmethod
    def attend_back(
        gradient: torch.Tensor,
        saved: Sequence[torch.Tensor],
        turns: Turns | None,
        scale: float,
        rows: Layout,
        to_projected: Sequence[torch.Tensor],
    ) -> None:
        """Fill `to_projected`, shaped as queries, keys and values, from the gradient [T, H, D]."""


class ProductAttention(Attention):
    """Rows of about equal length side by side, in large products.

    Places after the ends of a bucket's shorter rows hold 0 and need no mask: they come after all
    that is real, so that nothing real sees them.
    """

    longest = EXPLICIT_UP_TO

    @staticmethod
    def attend(
        projected: Sequence[torch.Tensor],
        turns: Turns | None,
        scale: float,
        rows: Layout,
        output: torch.Tensor,
    ) -> list[torch.Tensor]:
        saved = []
        for bucket in rows.buckets:
            factors, places = (scale, 1.0, 1.0), (turns, turns, None)
            queries, keys, values = (
                split_heads(x, bucket, place, factor, out=_heads(x, bucket))
                for x, place, factor in zip(projected, places, factors, strict=True)
            )
            saved += [queries, keys, values]
            results = _bmm(_shares(queries, keys), _by_key(values, values))
            join_heads(results.view_as(queries), bucket, None, 1.0, out=output)
        return saved

    @staticmethod
    def attend_back(
        gradient: torch.Tensor,
        saved: Sequence[torch.Tensor],
        turns: Turns | None,
        scale: float,
        rows: Layout,
        to_projected: Sequence[torch.Tensor],
    ) -> None:
        to_query, to_key, to_value = to_projected
        for index, bucket in enumerate(rows.buckets):
            queries, keys, values = saved[3 * index : 3 * index + 3]
            shares = _shares(queries, keys)
            outer = split_heads(gradient, bucket, None, 1.0, out=_heads(gradient, bucket))
            outer = _by_key(outer, values)
            sent = _bmm(shares.transpose(1, 2), outer).view_as(values)
            join_heads(sent, bucket, None, 1.0, out=to_value)
            to_scores = causal_softmax_back_(_bmm(outer, _by_key(values, values).mT), shares)
            back = _bmm(to_scores, _by_key(keys, keys)).view_as(queries)
            join_heads(back, bucket, turns, scale, out=to_query)
            back = _bmm(to_scores.mT, _by_key(queries, keys)).view_as(keys)
            join_heads(back, bucket, turns, 1.0, out=to_key)


def _heads(tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
    return pool.empty(tokens, len(rows), tokens.shape[1], rows.n, tokens.shape[2])


def _by_key(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return x [S, K·G, n, D] as [S·K, G·n, D], as many as `keys` [S, K, n, D] has heads."""
    return x.view(keys.shape[0] * keys.shape[1], -1, keys.shape[3])


def _shares(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the probabilities [S·K, G·n, n] of scaled queries [S, H, n, D], keys [S, K, n, D]."""
    return causal_softmax_(_bmm(_by_key(queries, keys), _by_key(keys, keys).mT))


def _bmm(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the products [N, I, J] of one [N, I, K] and other [N, K, J]."""
    return torch.bmm(one, other, out=pool.empty(one, *one.shape[:2], other.shape[2]))


class LoopAttention(Attention):
    """All rows and heads in one loop, of which nothing grows with the square of a row."""

    longest = sys.maxsize

    @staticmethod
    def attend(
        projected: Sequence[torch.Tensor],
        turns: Turns | None,
        scale: float,
        rows: Layout,
        output: torch.Tensor,
    ) -> list[torch.Tensor]:
        queries, keys, values = projected
        if turns is not None:
            for each in (queries, keys):
                causal.turn_heads([*_turned(each), *_places(turns)], 2)
        scratch = _scratch(queries, rows)
        causal.attend([*_told(projected, output, scale, rows, scratch), *[0] * 6], 2)
        return [queries, keys, values]

    @staticmethod
    def attend_back(
        gradient: torch.Tensor,
        saved: Sequence[torch.Tensor],
        turns: Turns | None,
        scale: float,
        rows: Layout,
        to_projected: Sequence[torch.Tensor],
    ) -> None:
        to_query, *to_others = to_projected
        n_tokens, n_heads, width = to_query.shape
        shape = (2, n_heads, n_tokens, width)
        sent = pool.empty(gradient, *shape, dtype=torch.float32)
        places = [each.data_ptr() for each in sent]
        scratch = _scratch(gradient, rows)
        told = _told(saved, gradient, scale, rows, scratch)
        causal.attend_back([*told, *_place(to_query), n_tokens, *places], 2)
        others = [number for each in to_others for number in _place(each)]
        n_keys = to_others[0].shape[1]
        causal.join_back([*_turned(to_query), *_places(turns), *others, n_keys, *places], 2)


def _longest(rows: Layout) -> int:
    return -(-rows.longest // causal.UNROLLED) * causal.UNROLLED


def _scratch(like: torch.Tensor, rows: Layout) -> torch.Tensor:
    """Return memory that the loops that attend use meanwhile."""
    n_bytes = torch.get_num_threads() * causal.scratch_bytes(_longest(rows))
    return pool.empty(like, n_bytes, dtype=torch.uint8)


def _told(
    projected: Sequence[torch.Tensor],
    result: torch.Tensor,
    scale: float,
    rows: Layout,
    scratch: torch.Tensor,
) -> list[int]:
    """Return what the loops that attend are told of first."""
    queries, keys, _ = projected
    whole = rows.whole
    numbers = [
        *(whole.firsts.ctypes.data, whole.lengths.ctypes.data, len(whole)),
        *(queries.shape[1], keys.shape[1], queries.shape[2], bits_of(scale)),
        *(products.scratch(torch.get_num_threads()), scratch.data_ptr(), _longest(rows)),
    ]
    for each in (*projected, result):
        numbers += _place(each)
    return numbers


def _place(tokens: torch.Tensor) -> tuple[int, int, int]:
    """Return where heads of tokens [tokens, heads, d] are, and how far the next ones are.

    Raises:
        ValueError: the numbers of a head lie apart, or are not bfloat16.
    """
    by_token, by_head, by_number = tokens.stride()
    if by_number != 1 or tokens.dtype != torch.bfloat16:
        raise ValueError(f"Heads in {tokens.dtype} with strides {tokens.stride()} are not read.")
    return tokens.data_ptr(), by_token, by_head


def _turned(tokens: torch.Tensor) -> tuple[int, ...]:
    return (*_place(tokens), *tokens.shape)


def _places(turns: Turns | None) -> tuple[int, int]:
    if turns is None:
        return 0, 0
    cosines, sines = turns
    return cosines.data_ptr(), sines.data_ptr()
