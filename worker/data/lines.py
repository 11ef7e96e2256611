"""A stream of bytes cut into lines: at ``\\n`` only, with a bound on what is held in memory."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_LINE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its ``\\n``.

    `number` counts from 1, `offset` is the file position of the first byte of `content`, which is
    None where the line has more bytes than the limit; `n_bytes` is its true length.
    """

    number: int
    offset: int
    n_bytes: int
    content: bytes | None


def split_lines(chunks: Iterable[bytes], max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Yield the lines of a file given in chunks of any size; holds one line and one chunk at most.

    A UTF-8 byte order mark at the very start is dropped. What follows the last ``\\n`` is a line
    unless it is empty.
    """
    number, offset = 1, 0
    held: list[bytes] = []
    n_bytes = 0

    def line() -> Line:
        content = b"".join(held) if n_bytes <= max_bytes else None
        if number == 1 and content is not None and content.startswith(codecs.BOM_UTF8):
            mark = len(codecs.BOM_UTF8)
            return Line(1, mark, n_bytes - mark, content[mark:])
        return Line(number, offset, n_bytes, content)

    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            held.append(chunk[start:end])
            n_bytes += end - start
            yield line()
            number, offset = number + 1, offset + n_bytes + 1
            start, n_bytes = end + 1, 0
            held.clear()
        n_bytes += len(chunk) - start
        if n_bytes <= max_bytes:
            held.append(chunk[start:])
        else:
            held.clear()
    if n_bytes:
        yield line()
