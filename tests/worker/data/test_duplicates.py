"""Repeated rows are told at the end: exact ones, and those that differ in looks alone."""

import subprocess
import sys

import pytest

from worker.data.duplicates import Duplicate, DuplicateFinder, likeness

ROW = b'{"messages":[{"role":"user","content":"How deep is it?"}]}'


def found(*rows: bytes) -> list[Duplicate]:
    finder = DuplicateFinder()
    for line, row in enumerate(rows, 10):
        finder.add(line, row)
    return list(finder.duplicates())


def test_different_rows_are_no_duplicates() -> None:
    assert found() == []
    assert found(ROW) == []
    assert found(ROW, ROW.replace(b"deep", b"cold"), b"") == []


def test_a_repeated_row_names_the_first_line_that_has_it() -> None:
    other = ROW.replace(b"deep", b"cold")
    assert found(ROW, other, ROW, other, ROW) == [
        Duplicate(12, 10, exact=True),
        Duplicate(13, 11, exact=True),
        Duplicate(14, 10, exact=True),
    ]


@pytest.mark.parametrize(
    "alike", [b"HOW DEEP is it?", b"How  deep is it", b"how deep, is it?!", b"(How deep) is it..."]
)
def test_case_spaces_and_punctuation_make_a_near_duplicate(alike: bytes) -> None:
    assert found(ROW, ROW.replace(b"How deep is it?", alike)) == [Duplicate(11, 10, exact=False)]


@pytest.mark.parametrize("other", ["Wie tief?", "How deep is it 2?", "どのくらい深い?"])
def test_other_words_numbers_and_scripts_are_not_alike(other: str) -> None:
    assert found(ROW, ROW.replace(b"How deep is it?", other.encode())) == []


def test_a_likeness_is_the_same_in_every_process() -> None:
    code = f"from worker.data.duplicates import likeness; print(likeness({ROW!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == likeness(ROW)
    assert 0 <= likeness(ROW) < 2**64
