"""Which rows of a pass go through which range of the shared columns."""

import torch

from worker.inference.engine.columns import Columns


def columns(*widths: int) -> Columns:
    """Return columns in which slot 0, 1, … has a range of its width."""
    found = Columns(len(widths), torch.device("cpu"))
    for slot, width in enumerate(widths):
        found.place(slot, width)
    return found


def test_rows_of_equal_ranges_get_lanes_and_find_their_result() -> None:
    mine = columns(4, 4, 4, 4)
    mine.use([3, 4, 1, 3], active={1, 3})  # slot 4 is the base
    lanes = mine.lanes
    assert lanes is not None
    assert mine.span == slice(4, 16)
    assert lanes.n == 3  # that of slot 2 stands between
    assert lanes.rows.view(3, 2).tolist() == [[2, 0], [0, 0], [0, 3]]
    assert lanes.rows[lanes.places[[0, 2, 3], 0]].tolist() == [0, 2, 3]
    assert lanes.is_taken is not None
    assert lanes.is_taken.tolist() == [[True], [False], [True], [True]]


def test_a_wide_range_is_several_lanes() -> None:
    mine = columns(4, 8, 16)
    mine.use([1, 0, 2], active={0, 1, 2})
    lanes = mine.lanes
    assert lanes is not None
    # The second range begins at 8, a multiple of its width; between stands nobody's lane.
    assert lanes.n == 8
    assert lanes.rows.tolist() == [1, 0, 0, 0, 2, 2, 2, 2]
    assert lanes.places.tolist() == [[2, 3, 0, 0], [0, 0, 0, 0], [4, 5, 6, 7]]
    assert lanes.is_taken is not None
    assert lanes.is_taken.sum(1).tolist() == [2, 1, 4]


def test_all_rows_with_a_range_need_no_choice() -> None:
    mine = columns(4, 4)
    mine.use([1, 0], active={0, 1})
    assert mine.lanes is not None
    assert mine.lanes.is_taken is None


def test_one_range_or_narrow_lanes_are_one_product() -> None:
    mine = columns(8, 2, 2, 256, 8)
    for rows in ([0, 0], [0, 1], [1, 2], [0, 3]):
        mine.use(rows, active=set(rows))
        assert mine.lanes is None
    mine.use([0, 4], active={0, 4})
    assert mine.lanes is not None


def test_lanes_are_even_as_long_as_most_places_are_taken() -> None:
    mine = columns(4, 4, 4, 4)
    mine.use([0, 1, 2, 3], active={0, 1, 2, 3})
    assert mine.lanes is not None
    assert mine.lanes.is_even
    mine.use([0, 0, 0, 0, 0, 3], active={0, 3})
    assert mine.lanes is not None
    assert not mine.lanes.is_even
