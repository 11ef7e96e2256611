"""Lines of JSON come out with the right numbers and offsets however the stream is cut."""

import random

from models.domain.reports import RowFinding
from worker.data.formats.json_lines import read_json_lines
from worker.data.records import Record

LIMIT = 50
ROW = b'{"a": 1}'


def read(data: bytes, size: int = 1 << 20, offset: int = 0) -> list[Record | RowFinding]:
    chunks = (data[at : at + size] for at in range(0, len(data), size))
    return list(read_json_lines(chunks, LIMIT, offset))


def raws(data: bytes) -> list[bytes | None]:
    return [item.raw for item in read(data) if isinstance(item, Record)]


def test_line_ends_of_all_kinds_end_a_row_and_nothing_else_does() -> None:
    text = '{"a": "\u2028\u2029\x85\x0b\x0c"}'.encode()
    assert raws(ROW + b"\n" + text + b"\n") == [ROW, text]
    assert raws(ROW + b"\r\n" + ROW) == [ROW + b"\r", ROW]
    assert raws(ROW) == [ROW]
    assert raws(b"") == []


def test_blank_lines_are_tolerated_at_the_end_and_found_inside() -> None:
    assert raws(ROW + b"\n\n \t\r\n") == [ROW]
    found = [
        item for item in read(ROW + b"\n\n\r\n" + ROW + b"\n\n" + ROW) if not hasattr(item, "raw")
    ]
    assert [(item.line, getattr(item, "code", "")) for item in found] == [
        (2, "blank_line"),
        (5, "blank_line"),
    ]
    assert "lines 2 to 3 are blank" in getattr(found[0], "message", "")


def test_a_line_that_is_too_long_is_one_finding_and_reading_goes_on() -> None:
    long = b'{"x": "' + b"y" * LIMIT + b'"}'
    for size in (3, 20, 1 << 20):
        first, second, third, fourth = read(ROW + b"\n" + long + b"\n" + ROW + b"\n" + long, size)
        assert isinstance(first, Record)
        assert isinstance(second, RowFinding)
        assert isinstance(third, Record)
        assert isinstance(fourth, RowFinding)
        assert (second.line, second.code, second.offset) == (2, "line_too_long", len(ROW) + 1)
        assert f"{len(long)} bytes" in second.message
        assert (third.line, third.raw, fourth.line) == (3, ROW, 4)


def test_a_line_of_exactly_the_limit_is_a_row() -> None:
    assert raws(b"{" + b"x" * (LIMIT - 1)) == [b"{" + b"x" * (LIMIT - 1)]


def test_numbers_and_offsets_do_not_depend_on_the_chunks() -> None:
    draw = random.Random(3)
    for _ in range(300):
        lines = [draw.choice([ROW, b"", b" ", b"x", b"y" * 60, b"{}\r"]) for _ in range(12)]
        data = b"\n".join(lines)
        whole = read(data, offset=3)
        assert whole == read(data, draw.randint(1, 9), offset=3)
        for item in whole:
            if isinstance(item, Record):
                assert item.offset is not None
                assert item.raw == lines[item.line - 1]
                assert data[item.offset - 3 :].startswith(item.raw)
