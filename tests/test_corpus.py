"""A corpus of small files, one dialect or fault each, and the exact report on every one of them.

``tests/data/expected.json`` was written by hand-checking each report; it changes with the lint.
"""

import json
from pathlib import Path

import pytest

from worker.data.lint import LintOptions, lint

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text())
FILES = sorted((DATA / "corpus").iterdir())


def test_every_file_has_an_expected_report() -> None:
    assert sorted(EXPECTED) == [path.name for path in FILES]
    assert len(FILES) >= 80


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_report_is_exactly_the_expected_one(path: Path) -> None:
    report = lint(path, LintOptions(name=path.name))
    assert {
        "format": report.format,
        "container": report.container,
        "shape": report.shape,
        "rows": report.n_rows,
        "usable": report.n_valid_rows,
        "errors": [[each.line, each.code, each.path] for each in report.findings],
        "warnings": [[each.line, each.code, each.path] for each in report.warnings],
    } == EXPECTED[path.name]
    assert all(finding.hint for finding in report.findings)
    assert report.n_findings == len(report.findings)
    if report.shape:
        assert len(report.evidence) == 2


@pytest.mark.parametrize(
    "path", [path for path in FILES if EXPECTED[path.name]["shape"]], ids=lambda path: path.name
)
def test_the_shape_does_not_depend_on_the_name(path: Path) -> None:
    report = lint(path, LintOptions(name=""))
    assert (report.shape, report.n_valid_rows) == (
        EXPECTED[path.name]["shape"],
        EXPECTED[path.name]["usable"],
    )
