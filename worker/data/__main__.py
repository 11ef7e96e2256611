"""``python -m worker.data``: check a data file, or preview what a model would learn from it.

The same lint and the same renderer as in a job; no service is needed. Exit status 1: errors.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.domain.reports import DatasetReport, RowFinding
from worker.data.lint import LintOptions, Outputs, lint


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tunery data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check_parser = commands.add_parser("check", help="find every fault of a file")
    preview_parser = commands.add_parser("preview", help="show rows as a base model sees them")
    preview_parser.add_argument("--model", required=True, help="base model")
    preview_parser.add_argument("--rows", type=int, default=3, help="how many rows to show")
    preview_parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row")
    for each in (check_parser, preview_parser):
        each.add_argument("file", type=Path)
        each.add_argument("--json", action="store_true", help="print JSON")
        each.add_argument("--shape", default="", help="what the rows are; detected if absent")
        each.add_argument(
            "--columns",
            type=parse_columns,
            default={},
            metavar="OURS=THEIRS,…",
            help="names of columns, e.g. messages=conversations",
        )
    given = parser.parse_args(argv)
    if not given.file.is_file():
        parser.error(f"{given.file} is no file")
    if given.command == "preview":
        from worker.data.preview_command import preview

        options = options_of(given)
        shown = (given.model, given.rows, given.max_length)
        return preview(given.file, options, *shown, as_json=given.json)
    return check(given.file, options_of(given), as_json=given.json)


def options_of(given: argparse.Namespace) -> LintOptions:
    return LintOptions(name=given.file.name, shape=given.shape, columns=given.columns)


def parse_columns(text: str) -> dict[str, str]:
    """Read ``ours=theirs,ours=theirs``."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError("write OURS=THEIRS, e.g. messages=conversations")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def check(path: Path, options: LintOptions, *, as_json: bool) -> int:
    """Lint a file and print the report; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        findings = Path(folder) / "findings.jsonl"
        report = lint(path, options, Outputs(findings=findings))
        if as_json:
            every = [
                RowFinding.model_validate_json(line) for line in findings.read_bytes().splitlines()
            ]
            sys.stdout.buffer.write(orjson.dumps(as_plain(report, every)) + b"\n")
        else:
            show(path, report, Console())
    return 1 if report.n_findings or not report.n_valid_rows else 0


def as_plain(report: DatasetReport, findings: list[RowFinding]) -> dict[str, object]:
    """Return what ``--json`` prints."""

    def of_level(level: str) -> list[dict[str, object]]:
        keys = {"line", "path", "code", "message", "hint", "offset"}
        return [each.model_dump(include=keys) for each in findings if each.level == level]

    return {
        "rows": report.n_rows,
        "usable": report.n_valid_rows,
        "format": report.format,
        "shape": report.shape,
        "form": report.form,
        "columns": report.columns,
        "evidence": report.evidence,
        "errors": of_level("error"),
        "warnings": of_level("warning"),
    }


def show(path: Path, report: DatasetReport, console: Console) -> None:
    """Print a report for people."""
    what = " ".join(filter(None, (report.shape or "unknown shape", f"({report.format})")))
    console.print(f"[bold]{path.name}[/bold]: {what}", highlight=False)
    for sentence in report.evidence:
        console.print(f"  {sentence}", highlight=False, markup=False, style="dim")
    console.print(f"  {report.n_valid_rows:,} of {report.n_rows:,} rows are usable.")
    for title, style, count, findings in (
        ("errors", "red", report.n_findings, report.findings),
        ("warnings", "yellow", report.n_warnings, report.warnings),
    ):
        if not count:
            continue
        table = Table("line", "place", "code", "what to do", title=f"{count:,} {title}")
        for finding in findings:
            said = Text(finding.message[:1].upper() + finding.message[1:])
            said.append(f" {finding.hint}" if finding.hint else "", style="dim")
            code = Text(finding.code, style=style)
            table.add_row(str(finding.line), Text(finding.path), code, said)
        console.print(table)
        if count > len(findings):
            console.print(f"… and {count - len(findings):,} more; --json lists all.")


if __name__ == "__main__":
    sys.exit(main())
