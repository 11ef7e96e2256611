"""Reused prefixes: no token changes, and no adapter ever continues another one's states."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tests.worker.inference.tiny import Files, byte_engine, generate, shapes_of, tiny_llama
from worker.inference.engine.blocks import root_of
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.params import Sampling
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.prefix import BLOCK_TOKENS, PrefixStore
from worker.inference.engine.scheduler import Limits

SHARED = tuple(1 + index * 7 % 255 for index in range(3 * BLOCK_TOKENS))
GREEDY = Sampling(12, temperature=0)


@pytest.fixture
def engine() -> Iterator[BatchingEngine]:
    engine = byte_engine()
    yield engine
    engine.close()


def leases(engine: BatchingEngine, folder: Path) -> list[AdapterLease | None]:
    """The base and two adapters."""
    shapes = shapes_of(tiny_llama())
    return [None] + [
        engine.load(str(seed), Files(shapes, seed=seed, size=0.4).write(folder / str(seed)))
        for seed in (1, 2)
    ]


def answers(engine: BatchingEngine, who: list[AdapterLease | None]) -> list[tuple[str, int]]:
    """What everybody says after the shared prefix and an end of two kinds, and what was cached."""
    results = []
    for end in (5, 6):
        for lease in who:
            text, last = generate(engine, Request((*SHARED, end), GREEDY, lease=lease))
            results.append((text, last.n_cached))
    return results


def test_a_prompt_that_begins_like_one_before_gets_the_same_tokens_from_stored_states(
    engine: BatchingEngine, tmp_path: Path
) -> None:
    plain = byte_engine(limits=Limits(prefix_tokens=0))
    expected = answers(plain, leases(plain, tmp_path))
    plain.close()
    found = answers(engine, leases(engine, tmp_path))
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [n for _, n in expected] == [0] * 6
    assert [n for _, n in found] == [0] * 3 + [len(SHARED)] * 3
    assert len({text for text, _ in found}) == 6


def test_without_the_adapter_in_the_root_answers_would_be_another_models(
    engine: BatchingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the test above can fail: this is the mistake that it is there to find."""
    who = leases(engine, tmp_path)
    expected = [text for text, _ in answers(engine, who)]
    monkeypatch.setattr(
        "worker.inference.engine.runner.root_of", lambda base, adapter: root_of(base, None)
    )
    assert [text for text, _ in answers(engine, who)] != expected


def test_the_last_token_of_a_prompt_is_always_fed(engine: BatchingEngine) -> None:
    request = Request(SHARED, GREEDY)
    first, _ = generate(engine, request)
    again, last = generate(engine, request)
    assert again == first
    assert last.n_cached == len(SHARED) - BLOCK_TOKENS


def states(value: float, n_tokens: int) -> DynamicCache:
    cache = DynamicCache()
    steps = value + torch.arange(n_tokens)[None, None, :, None].expand(1, 2, -1, 4)
    cache.update(steps, -steps, 0)
    return cache


def test_states_come_back_in_their_order_and_only_as_far_as_they_are_stored() -> None:
    store = PrefixStore(8 * BLOCK_TOKENS)
    prompt = list(range(2 * BLOCK_TOKENS + 5))
    store.save(b"a", prompt, states(0.0, len(prompt)))
    cache = DynamicCache()
    assert store.load(b"a", [*prompt, 1], cache) == 2 * BLOCK_TOKENS
    layer = cache.layers[0]
    assert isinstance(layer, DynamicLayer)
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    assert keys[0, 1, :, 2].tolist() == list(range(2 * BLOCK_TOKENS))
    assert torch.equal(values, -keys)
    assert store.load(b"b", prompt, DynamicCache()) == 0
