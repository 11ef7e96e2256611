"""JSON that is not in lines: an array of rows, such an array in an object, rows in a row.

The text is cut into rows by a scanner that knows strings and brackets and nothing else, so that a
file of any size is read in the memory of one row, and a broken row costs only itself.
"""

import re
from collections.abc import Iterable, Iterator

from models.domain.reports import RowFinding
from worker.data.formats.json_lines import too_long
from worker.data.records import Fault, Record

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_RESUME = re.compile(rb"\n[ \t]*\{")
_SPACE = b" \t\r\n"
_OPENS = (b"{", b"[")
_CLOSES = {b"}": b"{", b"]": b"["}


def read_json_values(
    chunks: Iterable[bytes], max_row_bytes: int, *, in_array: bool, prefix: int = 0
) -> Iterator[Record | RowFinding]:
    """Yield a record for each value, with its line and offset.

    Args:
        chunks: The file's bytes without a byte order mark.
        in_array: The rows are the elements of the array that begins after `prefix` bytes; else they
            stand one after another.
        prefix: How much of the file comes before that array.
    """
    scanner = _Scanner(max_row_bytes, in_array=in_array, prefix=prefix)
    for chunk in chunks:
        yield from scanner.feed(chunk)
        if scanner.is_done:
            return
    yield from scanner.finish()


class _Scanner:
    """Cuts rows out of a stream; the row that is being read begins at `_start` of the buffer."""

    def __init__(self, max_row_bytes: int, *, in_array: bool, prefix: int) -> None:
        self.is_done = False
        self._limit = max_row_bytes
        self._in_array = in_array
        self._skip = prefix
        self._buffer = b""
        self._offset = 0
        """Place of the buffer in the file."""
        self._start = self._at = 0
        """Where the row begins, and where scanning goes on."""
        self._line = 1
        """The line of `_start`."""
        self._stack: list[bytes] = []
        self._is_open = not in_array
        self._is_closed = False
        self._is_broken = False

    def feed(self, chunk: bytes) -> Iterator[Record | RowFinding]:
        self._buffer = self._buffer[self._start :] + chunk
        self._offset += self._start
        self._at -= self._start
        self._start = 0
        if self._skip:
            if len(self._buffer) <= self._skip:
                return
            self._move(self._skip)
            self._skip = 0
        yield from self._scan()
        if self._is_closed and not self.is_done and self._has_row(len(self._buffer)):
            yield from self._after_the_end()
        if len(self._buffer) - self._start > self._limit and not self.is_done:
            self.is_done = True
            yield too_long(len(self._buffer) - self._start, self._limit).finding(*self._place())

    def finish(self) -> Iterator[Record | RowFinding]:
        """Tell what is left at the end of the file."""
        if self.is_done or self._is_closed:
            return
        if self._buffer[self._start :].strip(_SPACE) and not self._is_broken:
            yield self._invalid("the row is not closed at the end of the file.")
        if self._in_array:
            n_lines = self._line + self._buffer.count(b"\n", self._start)
            yield Fault(
                "truncated_file",
                "the array is not closed; the file ends too early.",
                hint="Upload the whole file.",
            ).finding(n_lines)

    def _scan(self) -> Iterator[Record | RowFinding]:
        while not self._is_closed:
            if self._is_broken and not self._resume():
                return
            token = _TOKEN.search(self._buffer, self._at)
            end = token.start() if token else len(self._buffer)
            quote = self._buffer.find(b'"', self._at, end)
            if quote >= 0:  # a string that goes on in the next chunk
                self._at = quote
                return
            if token is None:
                self._at = end
                return
            self._at = token.end()
            yield from self._take(token[0], token.start(), token.end())

    def _take(self, token: bytes, start: int, end: int) -> Iterator[Record | RowFinding]:
        if not self._is_open:
            self._is_open = True
            self._move(end)
        elif token in _OPENS:
            self._stack.append(token)
        elif token in _CLOSES:
            yield from self._close(token, start, end)
        elif token == b"," and not self._stack:
            yield from self._separate(start, end)

    def _close(self, token: bytes, start: int, end: int) -> Iterator[Record | RowFinding]:
        if not self._stack and self._in_array and token == b"]":
            if self._has_row(start):
                yield self._record(start)
            self._is_closed = True
            self._move(end)
        elif not self._stack or self._stack.pop() != _CLOSES[token]:
            self._is_broken = True
            self._stack.clear()
            yield self._invalid("brackets do not match.")
        elif not self._stack and not self._in_array:
            yield self._record(end)
            self._move(end)

    def _separate(self, start: int, end: int) -> Iterator[Record | RowFinding]:
        if not self._has_row(start):
            yield self._invalid("there is no row before a comma.")
        elif self._in_array:
            yield self._record(start)
        else:
            yield self._invalid("rows are separated by a comma, but there is no array.")
        self._move(end)

    def _after_the_end(self) -> Iterator[Record | RowFinding]:
        """Ignore what an object around the array goes on with; refuse anything else."""
        self.is_done = True
        if not self._buffer[self._start :].lstrip(_SPACE).startswith((b"}", b",")):
            yield self._invalid("there is text after the end of the array.")

    def _resume(self) -> bool:
        """Go to the next line that begins with a row; say whether there is one yet."""
        found = _RESUME.search(self._buffer, self._at)
        if found is None:
            # What may be the beginning of such a line is kept for the next chunk.
            last = self._buffer.rfind(b"\n", self._at)
            is_open = last >= 0 and not self._buffer[last:].strip(_SPACE)
            self._move(last if is_open else len(self._buffer))
            return False
        self._is_broken = False
        self._move(found.end() - 1)
        return True

    def _has_row(self, end: int) -> bool:
        return bool(self._buffer[self._start : end].strip(_SPACE))

    def _record(self, end: int) -> Record:
        line, offset = self._place()
        return Record(line, offset, self._buffer[self._start : end].strip(_SPACE))

    def _place(self) -> tuple[int, int]:
        """Return the line and the offset of the first character of the row."""
        start = self._start
        while start < len(self._buffer) and self._buffer[start] in _SPACE:
            start += 1
        return self._line + self._buffer.count(b"\n", self._start, start), self._offset + start

    def _invalid(self, message: str) -> RowFinding:
        return Fault("invalid_json", message, hint="Write JSON rows.").finding(*self._place())

    def _move(self, start: int) -> None:
        """Begin a new row at `start`."""
        self._line += self._buffer.count(b"\n", self._start, start)
        self._start = self._at = start
