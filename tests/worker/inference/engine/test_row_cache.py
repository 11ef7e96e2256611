"""The rows of the decode batch: what a row holds, and what a gap leaves behind."""

import inspect

import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from tests.worker.inference.tiny import tiny_llama
from worker.inference.engine.row_cache import RowCache, can_share_rows


def filled(value: float, length: int) -> DynamicCache:
    cache = DynamicCache()
    states = torch.full((1, 2, length, 4), value)
    cache.update(states, states, 0)
    return cache


@torch.inference_mode()
def rows_after_feed(rows: RowCache, values: list[float]) -> torch.Tensor:
    """Feed one token to all rows; return the first channel of the keys [rows, width]."""
    every = slice(0, len(rows))
    cache, _, _ = rows.feed(every, torch.float32)
    token = torch.tensor(values)[:, None, None, None].expand(-1, 2, 1, 4)
    keys, _ = cache.update(token, token, 0)
    rows.advance(every)
    return keys[:, 0, :, 0]


def test_rows_of_other_lengths_stand_side_by_side_and_the_mask_hides_the_rest() -> None:
    rows = RowCache()
    rows.append(filled(1, 3))
    rows.append(filled(2, 1))
    _, positions, mask = rows.feed(slice(0, 2), torch.float32)
    assert positions.tolist() == [[3], [1]]
    assert (mask[:, 0, 0] < 0).tolist() == [[False] * 4, [False, False, True, True]]
    assert rows_after_feed(rows, [8, 9]).tolist() == [[1, 1, 1, 8], [2, 9, 0, 0]]


def test_the_last_row_moves_into_a_gap() -> None:
    rows = RowCache()
    for value in (1, 2, 3):
        rows.append(filled(value, value))
    rows.remove(0)
    assert rows_after_feed(rows, [8, 9])[:, :4].tolist() == [[3, 3, 3, 8], [2, 2, 9, 0]]
    rows.remove(1)
    rows.remove(0)
    assert len(rows) == 0


def test_a_model_with_sliding_windows_does_not_share_rows() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=8)
    assert not can_share_rows(config, inspect.signature(MistralForCausalLM.forward).parameters)
    llama = tiny_llama()
    assert can_share_rows(llama.config, inspect.signature(type(llama).forward).parameters)
    assert not can_share_rows(llama.config, {"input_ids"})
