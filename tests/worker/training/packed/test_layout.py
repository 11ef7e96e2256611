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
    buckets = Layout.of(lengths, "default").buckets
    assert buckets[0].start == 0
    assert buckets[-1].end == sum(lengths)
    for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
        assert following is None or bucket.end == following.start
        tokens = bucket.gather[bucket.real].tolist()
        assert tokens == list(range(bucket.start, bucket.end))
        places = sorted([*bucket.real.tolist(), *bucket.spare.tolist()])
        assert places == list(range(bucket.n_rows * bucket.n))
        assert len(bucket.spare) <= (1 - ALIKE) * len(places)


def test_the_spare_places_of_a_row_come_after_its_own() -> None:
    (bucket,) = Layout.of([10, 9], "default").buckets
    assert (bucket.n_rows, bucket.n) == (2, 10)
    assert bucket.spare.tolist() == [19]
    assert int(bucket.gather[19]) == 18


def test_a_layout_is_active_inside_its_pass_only() -> None:
    made = Layout.of([2], "default")
    assert not layout.is_active()
    with layout.active(made):
        assert layout.current() is made
        assert layout.is_active()
    assert not layout.is_active()
    with pytest.raises(LookupError):
        layout.current()
