"""Lines are the same however the stream is cut, and an endless one is not held in memory."""

import random
import tracemalloc

from worker.data.lines import MAX_LINE_BYTES, Line, split_lines

MEBIBYTE = 1024 * 1024


def cut(data: bytes, draw: random.Random) -> list[bytes]:
    chunks = []
    while data:
        size = draw.randint(1, 7)
        chunks.append(data[:size])
        data = data[size:]
    return chunks


def test_numbers_and_offsets_do_not_depend_on_the_chunks() -> None:
    draw = random.Random(5)
    for _ in range(200):
        parts = ["".join(draw.choices("ab\r\u2028é", k=draw.randint(0, 9))) for _ in range(6)]
        data = "\n".join(parts).encode()
        lines = list(split_lines(cut(data, draw)))
        expected = data.split(b"\n")
        if not expected[-1]:
            expected.pop()
        assert [line.content for line in lines] == expected
        assert [line.number for line in lines] == list(range(1, len(expected) + 1))
        for line in lines:
            assert line.content is not None
            assert data[line.offset : line.offset + line.n_bytes] == line.content


def test_one_byte_order_mark_at_the_start_is_dropped() -> None:
    mark = b"\xef\xbb\xbf"
    assert list(split_lines([mark[:2], mark[2:] + b"a\n", mark + b"b"])) == [
        Line(1, 3, 1, b"a"),
        Line(2, 5, 4, mark + b"b"),
    ]


def test_a_line_at_the_limit_passes_and_one_byte_more_does_not() -> None:
    at_limit = b"x" * MAX_LINE_BYTES
    first, second, third = split_lines([at_limit, b"\n", at_limit, b"y\nz"])
    assert first.content == at_limit
    assert (second.content, second.n_bytes) == (None, MAX_LINE_BYTES + 1)
    assert third == Line(3, 2 * MAX_LINE_BYTES + 3, 1, b"z")


def test_a_line_without_end_is_counted_but_not_held() -> None:
    chunk = b"x" * MEBIBYTE
    tracemalloc.start()
    try:
        (line,) = split_lines(chunk for _ in range(100))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (line.content, line.n_bytes) == (None, 100 * MEBIBYTE)
    assert peak < 2 * MAX_LINE_BYTES
