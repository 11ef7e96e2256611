"""CSV and its relatives: comma, semicolon, tab or bar between fields, quotes around them."""

import csv
from collections.abc import Iterable, Iterator

from models.domain.reports import RowFinding
from worker.data.containers import UnreadableError
from worker.data.formats.json_lines import too_long
from worker.data.records import Fault, Record
from worker.data.text_encodings import decoded_lines

DELIMITERS = {",": "csv", ";": "csv", "\t": "tsv", "|": "csv"}
SNIFFED_ROWS = 20


def delimiter_of(head: str, *, is_named_so: bool) -> str:
    """Return what separates the fields of a text, or an empty string if it has no columns.

    Args:
        head: The first lines.
        is_named_so: The file's name ends in ``.csv`` or ``.tsv``: then one column is enough.
    """
    best, most = "", 1
    for delimiter in DELIMITERS:
        rows = []
        try:
            for row in csv.reader(head.splitlines(keepends=True), delimiter=delimiter):
                rows.append(row)
        except csv.Error:
            pass  # a quote that the head cuts off; the rows before it tell enough
        rows = [row for row in rows[:SNIFFED_ROWS] if row]
        if len(rows) < (1 if is_named_so else 2):
            continue
        n_fields = len(rows[0])
        n_alike = sum(len(row) == n_fields for row in rows)
        names = all(name.strip() and len(name) < 64 and "\n" not in name for name in rows[0])
        if n_fields > most and names and (is_named_so or 2 * n_alike > len(rows)):
            best, most = delimiter, n_fields
    return best or ("," if is_named_so else "")


def read_delimited(
    chunks: Iterable[bytes], delimiter: str, max_row_bytes: int
) -> Iterator[Record | RowFinding]:
    """Yield a record for each row below the header; every value is text."""
    # Fields may be long; the limit on rows is ours, and this one is the whole process's.
    csv.field_size_limit(max_row_bytes)
    reader = csv.reader(decoded_lines(chunks), delimiter=delimiter, strict=True)
    header: list[str] = []
    first_line = 1
    while True:
        first_line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield _fault_of(error, reader.line_num - first_line, max_row_bytes).finding(first_line)
            continue
        if not row:
            continue
        if not header:
            header = [name.strip() for name in row]
            _check_header(header)
        elif len(row) != len(header):
            yield Fault(
                "wrong_field_count",
                f"the row has {len(row)} fields; the header has {len(header)}.",
                hint="Put quotes around text that contains the separator or quotes.",
            ).finding(first_line)
        else:
            yield Record(first_line, None, None, dict(zip(header, row, strict=True)))


def _check_header(header: list[str]) -> None:
    empty = [at for at, name in enumerate(header, 1) if not name]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if empty:
        what = f"column {empty[0]} has no name."
    elif repeated:
        what = f"two columns are named {repeated[0][:40]!r}."
    else:
        return
    raise UnreadableError(
        Fault("invalid_header", what, hint="Give every column a name of its own in the first line.")
    )


def _fault_of(error: csv.Error, n_lines: int, limit: int) -> Fault:
    said = str(error)
    if "field limit" in said or "unexpected end" in said:
        if n_lines > 0 or "unexpected end" in said:
            return Fault(
                "unclosed_quote",
                "a quote that opens in this row is never closed.",
                hint='Close it, and write a quote inside a field twice ("").',
            )
        return too_long(limit + 1, limit)
    return Fault(
        "invalid_csv",
        f"{said}.",
        hint='Write a quote inside a field twice (""), and nothing after a closing one.',
    )
