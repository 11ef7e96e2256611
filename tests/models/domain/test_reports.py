"""Findings as a text that people read."""

from models.domain.reports import RowFinding, tell

LONG = [
    RowFinding(line=line, code="overlong_row", message=f"{n} tokens.", hint="Shorten it.")
    for line, n in ((1, 78), (2, 81), (5, 90))
]
BROKEN = RowFinding(line=7, code="invalid_json", message="not JSON.", hint="Write one object.")
EMPTY = RowFinding(line=9, code="empty", message="empty.", path="messages[0]")


def test_a_remedy_that_neighbours_share_is_told_once() -> None:
    assert tell([*LONG, BROKEN, EMPTY], 5) == (
        "Line 1: 78 tokens. Line 2: 81 tokens. Line 5: 90 tokens. Shorten it. "
        "Line 7: not JSON. Write one object. Line 9, messages[0]: empty."
    )


def test_how_many_there_are_is_told_where_some_are_not() -> None:
    assert tell(LONG, 3).endswith("Shorten it.")
    assert tell(LONG, 1234).endswith("Shorten it. (1,234 errors in all.)")


def test_what_does_not_fit_is_left_out_whole() -> None:
    assert tell([*LONG, BROKEN], 4, 60) == (
        "Line 1: 78 tokens. Line 2: 81 tokens. Shorten it. (4 errors in all.)"
    )
    assert tell(LONG, 3, 10) == ""


def test_no_findings_are_no_text() -> None:
    assert tell([], 0) == ""
