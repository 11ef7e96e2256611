"""The lint's own process: its report comes back, its limits hold, its death is a finding."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import LeaseLostError
from worker.data import isolated
from worker.data.isolated import LintOrder, lint_in_child
from worker.data.lint import lint
from worker.data.normalised import read_rows

ROW = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n'


def nothing() -> None:
    pass


def test_the_report_is_that_of_the_lint(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(ROW + b"{\n")
    order = LintOrder(path=path, normalised=tmp_path / "rows", findings=tmp_path / "findings")
    report = lint_in_child(order, nothing)
    assert report.data_sha256
    assert report.model_copy(update={"data_sha256": ""}) == lint(path)
    assert [line for line, _ in read_rows(tmp_path / "rows")] == [1]


def test_a_file_that_wants_too_much_memory_is_a_faulty_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 4_000_000])
    pq.write_table(pa.table({"text": text}), path, store_schema=False)
    report = lint_in_child(LintOrder(path=path, memory_bytes=600 << 20), nothing)
    assert report.findings[0].code in {"invalid_file", "decompressed_too_large"}
    assert report.n_valid_rows < 300


def test_a_lint_that_takes_too_long_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "POLL_SECONDS", 0.05)
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(ROW * 300_000))
    report = lint_in_child(LintOrder(path=path, seconds=0.1), nothing)
    assert report.findings[0].code == "lint_timeout"


def test_losing_the_lease_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "POLL_SECONDS", 0.05)
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(ROW * 300_000))

    def lose() -> None:
        raise LeaseLostError("gone")

    with pytest.raises(LeaseLostError):
        lint_in_child(LintOrder(path=path), lose)


def test_a_fault_of_the_service_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = lint_in_child(LintOrder(path=tmp_path / "missing"), nothing)
    assert report.findings[0].code == "lint_failed"
    assert report.n_findings == 1
