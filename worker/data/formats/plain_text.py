"""Running text: every block between blank lines is a row ``{"text": …}``."""

from collections.abc import Iterable, Iterator

from models.domain.reports import RowFinding
from worker.data.formats.json_lines import too_long
from worker.data.records import Record
from worker.data.text_encodings import decoded_lines


def read_plain_text(chunks: Iterable[bytes], max_row_bytes: int) -> Iterator[Record | RowFinding]:
    """Yield a record for each block; its line is the block's first."""
    block: list[str] = []
    first_line = n_bytes = 0
    for number, line in enumerate(decoded_lines(chunks), 1):
        text = line.rstrip("\r\n")
        if text.strip():
            first_line = first_line or number
            n_bytes += len(text)
            if n_bytes <= max_row_bytes:
                block.append(text)
            continue
        if first_line:
            yield _row(block, first_line, n_bytes, max_row_bytes)
            block, first_line, n_bytes = [], 0, 0
    if first_line:
        yield _row(block, first_line, n_bytes, max_row_bytes)


def _row(block: list[str], line: int, n_bytes: int, limit: int) -> Record | RowFinding:
    if n_bytes > limit:
        return too_long(n_bytes, limit).finding(line)
    return Record(line, None, None, {"text": "\n".join(block)})
