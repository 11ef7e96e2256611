"""Parquet and Arrow: values as JSON, odd columns left out aloud, bombs and damage stopped."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.domain.reports import RowFinding
from worker.data.containers import Limits, UnreadableError
from worker.data.formats.columnar import read_arrow, read_parquet
from worker.data.records import Record

ROWS: list[dict[str, Any]] = [
    {"text": f"row {number}", "labels": ["a", "b"], "score": number / 2, "nested": {"x": None}}
    for number in range(600)
]


def values(items: list[Record | RowFinding]) -> list[object]:
    return [item.value for item in items if isinstance(item, Record)]


def test_rows_come_as_json_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    items = list(read_parquet(path, Limits()))
    assert values(items) == ROWS
    assert [item.line for item in items] == list(range(1, 601))


@pytest.mark.parametrize("is_stream", [False, True])
def test_arrow_files_and_streams_are_read(tmp_path: Path, is_stream: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    make = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with make(tmp_path / "x", table.schema) as writer:
        writer.write_table(table)
    assert values(list(read_arrow(tmp_path / "x", Limits(), is_stream=is_stream))) == ROWS


def test_columns_that_are_no_json_are_left_out_with_a_warning(tmp_path: Path) -> None:
    rows = [{"text": "a", "at": datetime.datetime(2026, 1, 1), "raw": b"x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x")
    items = list(read_parquet(tmp_path / "x", Limits()))
    assert values(items) == [{"text": "a"}]
    found = [item for item in items if isinstance(item, RowFinding)]
    assert [(each.code, each.path, each.level) for each in found] == [
        ("unsupported_column", "at", "warning"),
        ("unsupported_column", "raw", "warning"),
    ]


def test_a_dictionary_bomb_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "x"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), ["x" * 1_000_000])
    pq.write_table(pa.table({"text": text}), path, store_schema=False)
    assert path.stat().st_size < 200_000
    n_rows = 0
    with pytest.raises(UnreadableError) as stopped:  # noqa: PT012
        for _ in read_parquet(path, Limits()):
            n_rows += 1
    assert stopped.value.fault.code == "decompressed_too_large"
    assert n_rows < 300


def test_too_many_rows_are_refused_by_what_the_file_says(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x")
    with pytest.raises(UnreadableError) as refused:
        list(read_parquet(tmp_path / "x", Limits(max_rows=599)))
    assert refused.value.fault.code == "too_many_rows"


@pytest.mark.parametrize("cut", [8, 100, 1000])
def test_damage_is_told(tmp_path: Path, cut: int) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "x").write_bytes(data[:cut] + data[cut + 50 :])
    with pytest.raises(UnreadableError) as refused:
        list(read_parquet(tmp_path / "x", Limits()))
    assert refused.value.fault.code == "invalid_file"
