"""Stored prefixes: found under their own root only, and always from the beginning of a prompt."""

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.inference.engine.blocks import PrefixBlocks, root_of

A, B = root_of("base", "a"), root_of("base", "b")


def test_roots_tell_models_adapters_and_the_base_apart() -> None:
    roots = [
        root_of(fingerprint, adapter)
        for fingerprint in ("f", "g", "f a", "")
        for adapter in (None, "a", "b", "base", "", "adapter a")
    ]
    assert len(set(roots)) == len(roots)


def test_the_longest_stored_prefix_is_found_in_whole_blocks() -> None:
    blocks = PrefixBlocks(8, 2)
    assert [number for number, _ in blocks.store(A, [1, 2, 3, 4, 5])] == [0, 1]
    stored = blocks.match(A, [1, 2, 3, 4, 5, 6])
    assert len(stored) == 2
    assert blocks.match(A, [1, 2, 9, 4]) == stored[:1]
    assert blocks.match(A, [1]) == []
    assert blocks.match(A, [3, 4]) == []
    assert [number for number, _ in blocks.store(A, [1, 2, 3, 4, 5, 6])] == [2]


def test_the_same_tokens_under_another_root_are_other_blocks() -> None:
    blocks = PrefixBlocks(8, 2)
    mine = [place for _, place in blocks.store(A, [1, 2, 3, 4])]
    assert blocks.match(B, [1, 2, 3, 4]) == []
    others = [place for _, place in blocks.store(B, [1, 2, 3, 4])]
    assert not set(mine) & set(others)


def test_a_full_store_forgets_what_was_used_least_recently_and_ends_before_beginnings() -> None:
    blocks = PrefixBlocks(4, 1)
    blocks.store(A, [1, 2])
    blocks.store(A, [7, 8])
    blocks.match(A, [1, 2])
    blocks.store(A, [5])
    assert len(blocks.match(A, [7, 8])) == 1
    assert len(blocks.match(A, [1, 2])) == 2


def test_a_prompt_longer_than_the_store_keeps_its_beginning() -> None:
    blocks = PrefixBlocks(2, 1)
    blocks.store(A, [1, 2, 3, 4])
    assert len(blocks.match(A, [1, 2, 3, 4])) == 2
    assert PrefixBlocks(0, 1).store(A, [1]) == []


tokens = st.lists(st.integers(0, 2), max_size=9)
roots = st.sampled_from([A, B])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 7),
    st.integers(1, 3),
    st.lists(st.tuples(st.booleans(), roots, tokens), max_size=25),
)
def test_a_place_that_is_found_holds_exactly_the_tokens_it_was_found_for(
    n_blocks: int, block_tokens: int, calls: list[tuple[bool, bytes, list[int]]]
) -> None:
    blocks = PrefixBlocks(n_blocks, block_tokens)
    content: dict[int, tuple[bytes, list[int]]] = {}  # what the store's tensors would hold
    for is_store, root, prompt in calls:
        if is_store:
            new = blocks.store(root, prompt)
            assert [n for n, _ in new] == list(range(new[0][0], new[-1][0] + 1) if new else [])
            for number, place in new:
                content[place] = (root, prompt[: (number + 1) * block_tokens])
            held = min(len(prompt) // block_tokens, n_blocks)
            assert len(blocks.match(root, prompt)) == held
        else:
            for number, place in enumerate(blocks.match(root, prompt)):
                assert content[place] == (root, prompt[: (number + 1) * block_tokens])
        assert len(blocks) <= n_blocks
