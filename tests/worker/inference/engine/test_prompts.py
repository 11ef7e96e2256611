"""Which prompts share a pass: those of like lengths that begin in different ways."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from worker.inference.engine.prompts import MOST_PADDING, together

BLOCK = 4


@dataclass(eq=False)
class Item:
    tokens: list[int]
    adapter: str | None = None
    n_fed: int = 0
    scores_prompt: bool = False
    n_stored: int = 0


def prompt(first: int, length: int, **options: object) -> Item:
    return Item([first, *range(length - 1)], **options)  # type: ignore[arg-type]


def chosen(items: list[Item], share: int = 1000) -> list[Item]:
    return together([(item, share) for item in items], lambda item: item.n_stored, BLOCK)


def test_prompts_of_like_lengths_go_together_and_others_wait() -> None:
    items = [prompt(1, 90), prompt(2, 80), prompt(3, 20), prompt(4, 95), prompt(5, 400)]
    assert chosen(items) == [items[0], items[1], items[3]]
    assert chosen(items[2:]) == [items[2]]


def test_prompts_that_begin_alike_go_one_after_the_other() -> None:
    same = [prompt(1, 30), prompt(1, 31), prompt(2, 30)]
    assert chosen(same) == [same[0], same[2]]
    other_adapter = [prompt(1, 30, adapter="a"), prompt(1, 30, adapter="b"), prompt(1, 30)]
    assert chosen(other_adapter) == other_adapter


def test_they_go_on_from_equally_many_tokens() -> None:
    items = [
        prompt(1, 40, n_stored=8),
        prompt(2, 40),
        prompt(3, 40, n_fed=8),
        Item([*range(8), 77, *range(31)], n_stored=8),
    ]
    # What is left of the third begins as what is left of the first, and of the last does not.
    assert chosen(items) == [items[0], items[3]]


def test_a_part_of_a_prompt_or_one_whose_tokens_are_scored_goes_alone() -> None:
    long, short, scored = prompt(1, 90), prompt(2, 80), prompt(3, 80, scores_prompt=True)
    waiting = [(long, 50), (short, 80), (scored, 80)]
    assert together(waiting, lambda item: 0, BLOCK) == [long]
    assert together([(scored, 80), (short, 80)], lambda item: 0, BLOCK) == [scored]
    assert together([(short, 80), (scored, 80), (long, 50)], lambda item: 0, BLOCK) == [short]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_padding_stays_within_its_share_and_the_first_is_always_fed(lengths: list[int]) -> None:
    items = [prompt(number + 1000, length) for number, length in enumerate(lengths)]
    found = chosen(items)
    assert found[0] is items[0]
    fed = sum(len(item.tokens) for item in found)
    assert max(len(item.tokens) for item in found) * len(found) <= (1 + MOST_PADDING) * fed
