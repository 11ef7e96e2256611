"""Numbers, sizes and times as the page writes them."""

import time

import pytest

from api.ui import filters


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "–"),
        (0, "0"),
        (1234567, "1\u202f234\u202f567"),
        (0.48563, "0.4856"),
        (12345.6, "12\u202f346"),
        (2e-4, "0.0002"),
    ],
)
def test_numbers(value: float | None, written: str) -> None:
    assert filters.number(value) == written


@pytest.mark.parametrize(
    ("n_bytes", "written"),
    [
        (None, "–"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (2.5e9, "2.5 GB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_sizes(n_bytes: float | None, written: str) -> None:
    assert filters.size(n_bytes) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (None, "–"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 1 s"),
        (7260, "2 h 1 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_durations(seconds: float | None, written: str) -> None:
    assert filters.duration(seconds) == written


def test_a_moment_is_told_from_now_and_exactly() -> None:
    written = filters.moment(time.time() - 90)
    assert ">1 min ago<" in written
    assert "UTC" in written
    assert filters.moment(None) == "–"
