"""Caches joined to rows of one, and taken out of it again."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from worker.inference.engine.caches import joined, row_of, states_of

CONFIG = LlamaConfig(num_hidden_layers=2)


def filled(value: float, length: int) -> DynamicCache:
    cache = DynamicCache(config=CONFIG)
    for number in range(2):
        states = torch.full((1, 2, length, 4), value + number)
        cache.update(states, -states, number)
    return cache


def test_rows_come_out_as_they_went_in_and_are_their_own() -> None:
    cache = joined([filled(1, 3), filled(5, 3)], CONFIG)
    assert [keys[:, 0, 0, 0].tolist() for keys, _ in states_of(cache)] == [[1, 5], [2, 6]]
    row = row_of(cache, 1, 2, CONFIG)
    assert row.get_seq_length() == 2
    assert [values.unique().tolist() for _, values in states_of(row)] == [[-5], [-6]]
    states_of(cache)[0][0].zero_()
    assert states_of(row)[0][0].unique().tolist() == [5]


def test_layers_of_another_kind_and_empty_ones_are_refused() -> None:
    with pytest.raises(TypeError, match="DynamicSlidingWindowLayer"):
        states_of(DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=8)))
    with pytest.raises(TypeError, match="DynamicLayer"):
        states_of(DynamicCache(config=CONFIG))
