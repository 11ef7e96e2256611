"""Rows are cut out of arrays and out of pretty-printed text, however the stream is cut."""

import json
import random

import pytest

from models.domain.reports import RowFinding
from worker.data.formats.json_values import read_json_values
from worker.data.records import Record

ROWS = [{"a": 'x "] }, {', "b": [1, {"c": "\\"}]}, {"a": "é\u2028"}, {}, {"a": [[], {}]}]


def read(
    text: bytes, *, in_array: bool = True, size: int = 1 << 20, prefix: int = 0
) -> list[Record | RowFinding]:
    chunks = (text[at : at + size] for at in range(0, len(text), size))
    return list(read_json_values(chunks, 1000, in_array=in_array, prefix=prefix))


def values(items: list[Record | RowFinding]) -> list[object]:
    return [json.loads(item.raw) for item in items if isinstance(item, Record) and item.raw]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("size", [1, 3, 7, 1 << 20])
def test_rows_come_whole_with_their_lines_and_offsets(indent: int | None, size: int) -> None:
    array = json.dumps(ROWS, indent=indent, ensure_ascii=False).encode()
    apart = b"\n".join(json.dumps(row, indent=indent).encode() for row in ROWS)
    for text, in_array in ((b" \n" + array, True), (apart, False)):
        items = read(text, in_array=in_array, size=size)
        assert values(items) == ROWS
        for item in items:
            assert isinstance(item, Record)
            assert item.offset is not None
            assert item.raw is not None
            assert text[item.offset :].startswith(item.raw)
            assert item.line == text.count(b"\n", 0, item.offset) + 1


def test_an_array_inside_an_object_is_read_and_what_follows_is_not() -> None:
    text = b'{"data": ' + json.dumps(ROWS).encode() + b', "total": 4}'
    assert values(read(text, prefix=len(b'{"data": '))) == ROWS


def test_a_broken_row_costs_only_itself() -> None:
    text = b'[\n{"a": 1},\n{"a": [}\n,\n{"a": 3},\n{"a": 4}\n]'
    items = read(text)
    assert values(items) == [{"a": 1}, {"a": 3}, {"a": 4}]
    (found,) = [item for item in items if isinstance(item, RowFinding)]
    assert (found.line, found.code) == (3, "invalid_json")


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (b"[", ["truncated_file"]),
        (b'[{"a": 1}', ["invalid_json", "truncated_file"]),
        (b'[{"a": 1},', ["truncated_file"]),
        (b'[{"a": "x', ["invalid_json", "truncated_file"]),
        (b'[{"a": 1}] {"b": 2}', ["invalid_json"]),
        (b'[,{"a": 1}]', ["invalid_json"]),
        (b"[]", []),
        (b'[{"a": 1},]', []),
    ],
)
def test_what_is_wrong_with_the_array_is_told(text: bytes, codes: list[str]) -> None:
    for size in (1, 1 << 20):
        items = read(text, size=size)
        assert [item.code for item in items if isinstance(item, RowFinding)] == codes


def test_a_row_that_is_too_long_ends_the_reading() -> None:
    items = read(b'[{"a": 1},\n{"a": "' + b"x" * 2000 + b'"}]', size=100)
    assert values(items) == [{"a": 1}]
    assert isinstance(items[-1], RowFinding)
    assert (items[-1].line, items[-1].code) == (2, "line_too_long")


def test_no_text_breaks_the_scanner_and_chunks_change_nothing() -> None:
    draw = random.Random(7)
    pieces = [b"{", b"}", b"[", b"]", b",", b'"', b"\\", b"\n", b'{"a": 1}', b" ", b"x"]
    for _ in range(3000):
        text = b"[" + b"".join(draw.choices(pieces, k=draw.randint(0, 15)))
        for in_array in (True, False):
            assert read(text, in_array=in_array, size=1) == read(text, in_array=in_array)
