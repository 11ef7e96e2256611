"""CSV of every kind: its delimiter is found, its quotes obeyed, its faults told by line."""

import csv
import io
import random

import pytest

from models.domain.reports import RowFinding
from worker.data.containers import UnreadableError
from worker.data.formats.delimited import delimiter_of, read_delimited
from worker.data.records import Record

LIMIT = 10_000


def read(text: str, delimiter: str = ",", size: int = 1 << 20) -> list[Record | RowFinding]:
    data = text.encode()
    chunks = (data[at : at + size] for at in range(0, len(data), size))
    return list(read_delimited(chunks, delimiter, LIMIT))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_what_the_csv_module_writes_is_read_back(delimiter: str) -> None:
    draw = random.Random(1)
    cells = ["", "a", 'say "x"', "two\nlines", "é, ü; |\t", "\r\n", " b "]
    rows = [[draw.choice(cells), draw.choice(cells)] for _ in range(60)]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["question", "answer"], *rows])
    assert delimiter_of(text.getvalue(), is_named_so=False) == delimiter
    for size in (1, 13, 1 << 20):
        items = read(text.getvalue(), delimiter, size)
        assert [
            [item.value["question"], item.value["answer"]]
            for item in items
            if isinstance(item, Record) and item.value
        ] == rows
        lines = [item.line for item in items]
        assert lines == sorted(lines)
        assert lines[0] == 2


@pytest.mark.parametrize(
    ("text", "line", "code"),
    [
        ("a,b\n1,2\n1,2,3\n1,2\n", 3, "wrong_field_count"),
        ("a,b\n1\n", 2, "wrong_field_count"),
        ('a,b\n1,2\n"x\ny",2\n"open,2\n1,2\n', 5, "unclosed_quote"),
        ('a,b\n"x"y,2\n', 2, "invalid_csv"),
        ("a,b\n" + "x" * (LIMIT + 1) + ",2\n", 2, "line_too_long"),
    ],
)
def test_faults_are_told_by_the_line_on_which_the_row_starts(
    text: str, line: int, code: str
) -> None:
    (found,) = [item for item in read(text) if isinstance(item, RowFinding)]
    assert (found.line, found.code) == (line, code)
    assert found.hint


@pytest.mark.parametrize("text", ["a,a\n1,2\n", "a,\n1,2\n"])
def test_a_header_must_name_every_column_once(text: str) -> None:
    with pytest.raises(UnreadableError) as refused:
        read(text)
    assert refused.value.fault.code == "invalid_header"


def test_a_byte_that_is_no_utf8_is_told_by_line_and_offset() -> None:
    data = "question,answer\nWo?,Östlich\n".encode("latin-1")
    for size in (1, 5, 1 << 20):
        chunks = (data[at : at + size] for at in range(0, len(data), size))
        with pytest.raises(UnreadableError) as refused:
            list(read_delimited(chunks, ",", LIMIT))
        assert refused.value.line == 2
        assert f"byte {data.index(0xD6)} of the file (0xD6)" in refused.value.fault.message


@pytest.mark.parametrize(
    "text", ["Just words.\nMore words, with a comma.\n", "one line", "", "a\nb\nc\n"]
)
def test_prose_has_no_columns_unless_its_name_says_so(text: str) -> None:
    assert delimiter_of(text, is_named_so=False) == ""
    assert delimiter_of(text, is_named_so=True) == ","
