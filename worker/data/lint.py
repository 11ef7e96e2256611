"""The lint of a data file: every fault by line, place and remedy, in one pass and flat memory.

What a file is and what its rows look like is detected and said, never guessed in silence. Usable
rows leave as one Arrow file of their form; all findings leave as JSON lines. Nothing here needs a
tokenizer or torch.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import orjson

from models.domain.base import JsonObject
from models.domain.reports import MAX_FINDINGS, DatasetReport, RowFinding
from models.domain.rows import LabelledRow, Row
from worker.data import fast_chat, json_values, shapes
from worker.data.containers import DEFAULT_LIMITS, Limits
from worker.data.duplicates import Duplicate, DuplicateFinder
from worker.data.normalised import NormalisedWriter
from worker.data.reader import RecordStream, open_records
from worker.data.records import Fault, Record

SAMPLE_ROWS = 100
MAX_WARNINGS_OF_ONE_CODE = 10
MAX_LABELS = 1000
FAST_SHAPE = "openai_chat"
NOT_ROWS = frozenset(
    {
        "blank_line",
        "empty_file",
        "decompressed_too_large",
        "too_many_rows",
        "truncated_file",
        "unsupported_format",
        "unsupported_column",
        "invalid_file",
        "invalid_header",
    }
)
"""Codes of a reader's findings that stand for no row."""


@dataclass(frozen=True, slots=True)
class LintOptions:
    """How a person wants a file read.

    Attributes:
        name: Its name, which decides only between readings that the bytes leave equal.
        shape: Shape that all rows have; detected if empty.
        columns: Our field names to the file's, e.g. ``{"messages": "conversations"}``.
    """

    name: str = ""
    shape: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the lint writes: usable rows, all findings, and the usable rows as they were given."""

    normalised: Path | None = None
    findings: Path | None = None
    cleaned: Path | None = None


DEFAULT_OPTIONS = LintOptions()
NO_OUTPUTS = Outputs()


def lint(
    path: Path, options: LintOptions = DEFAULT_OPTIONS, outputs: Outputs = NO_OUTPUTS
) -> DatasetReport:
    """Check a whole file; write what `outputs` asks for.

    `outputs.cleaned` is written only when rows are at fault and some are not.
    """
    with ExitStack() as stack:
        findings = outputs.findings
        sink = stack.enter_context(findings.open("wb")) if findings is not None else None
        run = _Lint(options, outputs, _Collector(sink))
        run.read(open_records(path, options.name, options.limits))
        if outputs.cleaned is not None and run.bad_lines and run.n_valid_rows:
            _write_cleaned(path, options, run.bad_lines, outputs.cleaned)
        return run.report()


class _Collector:
    """Counts findings by level and code, keeps the first of them, writes all of them."""

    def __init__(self, sink: BinaryIO | None) -> None:
        self._sink = sink
        self.counts: Counter[str] = Counter()
        self.n_errors = 0
        self.errors: list[RowFinding] = []
        self.n_warnings = 0
        self.warnings: list[RowFinding] = []

    def add(self, finding: RowFinding) -> None:
        self.counts[finding.code] += 1
        if finding.level == "error":
            self.n_errors += 1
            if len(self.errors) < MAX_FINDINGS:
                self.errors.append(finding)
        else:
            self.n_warnings += 1
            # One kind of warning must not hide all others.
            few = self.counts[finding.code] <= MAX_WARNINGS_OF_ONE_CODE
            if few and len(self.warnings) < MAX_FINDINGS:
                self.warnings.append(finding)
        if self._sink is not None:
            self._sink.write(orjson.dumps(finding.model_dump(exclude_none=True)) + b"\n")


class _Lint:
    """One pass over the records of one file."""

    def __init__(self, options: LintOptions, outputs: Outputs, collector: _Collector) -> None:
        self.n_rows = 0
        self.n_valid_rows = 0
        self.bad_lines = array("Q")
        self._options = options
        self._outputs = outputs
        self._collector = collector
        self._duplicates = DuplicateFinder()
        self._labels: Counter[str] = Counter()
        self._ignored: set[str] = set()
        self._format = self._container = ""
        self._evidence: list[str] = []
        self._detection: shapes.Detection | None = None
        self._data_sha256 = ""

    def read(self, stream: RecordStream) -> None:
        self._format, self._container = stream.format, stream.container
        self._evidence.append(stream.evidence)
        items = iter(stream)
        head = list(islice(items, SAMPLE_ROWS))
        detection = self._detect(head)
        records = chain(head, items)
        if detection is None:
            for item in records:
                self._count_unread(item)
            return
        self._detection = detection
        self._evidence.append(detection.evidence)
        form = detection.shape.form
        with NormalisedWriter(self._outputs.normalised, form) as writer:
            self._read_rows(records, detection, writer)
        if self._outputs.normalised is not None:
            self._data_sha256 = writer.data_sha256
        for duplicate in self._duplicates.duplicates():
            self._collector.add(_duplicate_finding(duplicate))

    def _detect(self, head: list[Record | RowFinding]) -> "shapes.Detection | None":
        samples: list[JsonObject] = []
        for item in head:
            if isinstance(item, Record):
                value = _value_of(item)
                if isinstance(value, dict):
                    samples.append(value)
        if not samples:
            return None
        found = shapes.detect(samples, self._options.columns, self._options.shape)
        if isinstance(found, shapes.Detection):
            return found
        first = next(item for item in head if isinstance(item, Record))
        self._collector.add(found.finding(first.line, first.offset))
        return None

    def _count_unread(self, item: Record | RowFinding) -> None:
        """Take note of a record in a file whose rows have no known shape."""
        if isinstance(item, RowFinding):
            self._take_reader_finding(item)
            return
        self.n_rows += 1
        self.bad_lines.append(item.line)
        value = _value_of(item)
        if isinstance(value, Fault):
            self._collector.add(value.finding(item.line, item.offset))
        elif not isinstance(value, dict):
            self._collector.add(_not_an_object(value).finding(item.line, item.offset))

    def _take_reader_finding(self, finding: RowFinding) -> None:
        self._collector.add(finding)
        if finding.code not in NOT_ROWS and finding.level == "error":
            self.n_rows += 1
            self.bad_lines.append(finding.line)

    def _read_rows(
        self,
        records: Iterable[Record | RowFinding],
        detection: "shapes.Detection",
        writer: NormalisedWriter,
    ) -> None:
        shape = detection.shape
        is_fast = shape.name == FAST_SHAPE and detection.columns["messages"] == "messages"
        is_kept = self._outputs.normalised is not None
        for item in records:
            if isinstance(item, RowFinding):
                self._take_reader_finding(item)
                continue
            self.n_rows += 1
            if self.n_rows > self._options.limits.max_rows:
                self._collector.add(_too_many_rows(self._options.limits, item.line))
                return
            raw = item.raw
            row: Row | fast_chat.FastRow | None = None
            if is_fast and raw is not None:
                row = fast_chat.accept(raw)
            if row is None:
                row = self._parse(item, detection)
            if row is None:
                self.bad_lines.append(item.line)
                continue
            self.n_valid_rows += 1
            text = raw if raw is not None else orjson.dumps(item.value)
            likeness = self._duplicates.add(item.line, text)
            if is_kept:
                writer.add(item.line, row, likeness)

    def _parse(self, record: Record, detection: "shapes.Detection") -> Row | None:
        """Return the row of a record, or None after noting what is wrong with it."""
        shape = detection.shape
        value = _value_of(record)
        if isinstance(value, Fault):
            fault = value
        elif not isinstance(value, dict):
            fault = _not_an_object(value)
        else:
            row = shape.parse(value, detection.columns)
            if not isinstance(row, Fault):
                self._take_warnings(record, shape.warnings(row, value, detection.columns))
                if isinstance(row, LabelledRow):
                    self._labels.update(row.labels)
                return row
            fault = row
        self._collector.add(fault.finding(record.line, record.offset))
        return None

    def _take_warnings(self, record: Record, warnings: list[Fault]) -> None:
        for warning in warnings:
            if warning.code == "ignored_field":
                # The same key in every row is one thing to know.
                key = warning.message
                if key in self._ignored:
                    continue
                self._ignored.add(key)
            self._collector.add(warning.finding(record.line, record.offset))

    def report(self) -> DatasetReport:
        found, detection = self._collector, self._detection
        return DatasetReport(
            n_rows=self.n_rows,
            n_valid_rows=self.n_valid_rows,
            n_findings=found.n_errors,
            findings=found.errors,
            n_warnings=found.n_warnings,
            warnings=found.warnings,
            counts=dict(found.counts),
            format=self._format,
            container=self._container,
            shape=detection.shape.name if detection else "",
            form=detection.shape.form if detection else "",
            columns=dict(detection.columns) if detection else {},
            evidence=[sentence for sentence in self._evidence if sentence],
            labels=dict(self._labels.most_common(MAX_LABELS)),
            labels_are_cut=len(self._labels) > MAX_LABELS,
            data_sha256=self._data_sha256 if self.n_valid_rows else "",
        )


def _value_of(record: Record) -> object:
    if record.raw is None:
        return json_values.nul_fault(record.value) or record.value
    return json_values.load(record.raw, record.offset or 0)


def _not_an_object(value: object) -> Fault:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return Fault(
        "not_an_object",
        f"the line holds {names.get(type(value), 'a number')}, not an object.",
        hint='Write one object a line, e.g. {"messages": […]}.',
    )


def _too_many_rows(limits: Limits, line: int) -> RowFinding:
    what = f"there are more than {limits.max_rows:,} rows; reading ends here."
    return Fault("too_many_rows", what, hint="Split the file.").finding(line)


def _duplicate_finding(duplicate: Duplicate) -> RowFinding:
    how = "is the same as" if duplicate.exact else "differs only in case or punctuation from"
    return Fault(
        "duplicate_row" if duplicate.exact else "near_duplicate_row",
        f"the row {how} line {duplicate.first_line}.",
        hint="Remove it, unless it is meant to count twice.",
        level="warning",
    ).finding(duplicate.line)


def _write_cleaned(path: Path, options: LintOptions, bad_lines: "array[int]", target: Path) -> None:
    """Write the usable rows as JSON lines, each as it was given, in a second pass."""
    bad = iter(bad_lines)
    next_bad = next(bad, None)
    with target.open("wb") as out:
        for record in open_records(path, options.name, options.limits):
            if isinstance(record, RowFinding):
                continue
            while next_bad is not None and next_bad < record.line:
                next_bad = next(bad, None)
            if record.line != next_bad:
                raw = record.raw if record.raw is not None else orjson.dumps(record.value)
                out.write(raw.strip() + b"\n")
