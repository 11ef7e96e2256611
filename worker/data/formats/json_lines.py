"""JSON lines: one row a line, cut at line feeds alone (a string may hold U+2028)."""

from collections.abc import Iterable, Iterator

from models.domain.reports import RowFinding
from worker.data.records import Fault, Record

_BLANK = b" \t\r"


def read_json_lines(
    chunks: Iterable[bytes], max_row_bytes: int, offset: int = 0
) -> Iterator[Record | RowFinding]:
    """Yield a record for each line; nothing is parsed.

    Tolerated are CRLF and blank lines at the end. Blank lines inside the file give one finding for
    each run of them; a line that is too long gives one and is not held in memory.

    Args:
        chunks: The file's bytes without a byte order mark.
        offset: Place of the first of them in the file.
    """
    number, first_blank = 1, 0
    for content, n_bytes in _lines(chunks, max_row_bytes):
        if content is None:
            outcome: Record | RowFinding = too_long(n_bytes, max_row_bytes).finding(number, offset)
        elif content.startswith(b"{") or content.strip(_BLANK):
            outcome = Record(number, offset, content)
        else:
            first_blank = first_blank or number
            number, offset = number + 1, offset + n_bytes + 1
            continue
        if first_blank:
            yield _blank_lines(first_blank, number - 1)
            first_blank = 0
        yield outcome
        number, offset = number + 1, offset + n_bytes + 1


def _lines(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield each line without its line feed, None if it is too long, and how many bytes it has."""
    rest = b""
    n_lost = 0  # bytes of a line that is too long, which are not kept
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        if n_lost or len(rest) + len(first) > limit:
            n_lost += len(rest) + len(first)
            rest = b""
        else:
            rest += first
        if not others:
            continue
        yield (None, n_lost) if n_lost else (rest, len(rest))
        *whole, rest = others
        for line in whole:
            yield (line, len(line)) if len(line) <= limit else (None, len(line))
        n_lost = len(rest) if len(rest) > limit else 0
        rest = b"" if n_lost else rest
    if n_lost or rest:
        yield (None, n_lost) if n_lost else (rest, len(rest))


def _blank_lines(first: int, last: int) -> RowFinding:
    what = "the line is blank." if first == last else f"lines {first} to {last} are blank."
    return Fault("blank_line", what, hint="Remove blank lines between rows.").finding(first)


def too_long(n_bytes: int, limit: int) -> Fault:
    return Fault(
        "line_too_long",
        f"the row has {n_bytes:,} bytes; {limit:,} are allowed.",
        hint="Write one row a line, and shorten what is in it.",
    )
