"""The geometry of packed batches: spans without gaps, buckets of like lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.training.packed import layout
from worker.training.packed.layout import ALIKE, Layout, Segment


def test_spans_follow_each_other_and_one_segment_covers_them() -> None:
    made = Layout.of([3, 1, 5], "default")
    assert made.spans == ((0, 3), (3, 4), (4, 9))
    assert made.segments == (Segment(0, 9, "default"),)
    assert made.longest == 5


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_buckets_hold_every_token_once_and_little_else(lengths: list[int]) -> None:
    made = Layout.of(lengths, "default")
    spans = [
        (first, first + length)
        for rows in made.buckets
        for first, length in zip(rows.firsts.tolist(), rows.lengths.tolist(), strict=True)
    ]
    assert tuple(spans) == made.spans
    for rows in made.buckets:
        longest = max(rows.lengths)
        assert rows.n == longest + longest % 2
        assert len(rows) * longest - sum(rows.lengths) <= (1 - ALIKE) * len(rows) * longest


def test_a_layout_is_active_inside_its_pass_only() -> None:
    made = Layout.of([2], "default")
    assert not layout.is_active()
    with layout.active(made):
        assert layout.current() is made
        assert layout.is_active()
    assert not layout.is_active()
    with pytest.raises(LookupError):
        layout.current()
