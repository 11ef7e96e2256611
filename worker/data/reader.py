"""From a file to records: what it is, told from its bytes, and the reader that fits.

Its name is asked only where the bytes leave two readings equal: a list of words may be a CSV file
with one column, or text.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from models.domain.reports import RowFinding
from worker.data import containers
from worker.data.containers import DEFAULT_LIMITS, HEAD, Limits, UnreadableError
from worker.data.formats.columnar import read_arrow, read_parquet
from worker.data.formats.delimited import DELIMITERS, delimiter_of, read_delimited
from worker.data.formats.json_lines import read_json_lines
from worker.data.formats.json_values import read_json_values
from worker.data.formats.plain_text import read_plain_text
from worker.data.records import Fault, Record
from worker.data.text_encodings import not_utf8_at_all, wide_encoding

BOM = b"\xef\xbb\xbf"
ARROW_FILE, ARROW_STREAM, PARQUET = b"ARROW1", b"\xff\xff\xff\xff", b"PAR1"
_WRAPPED = re.compile(
    rb'\s*\{\s*"(data|rows|examples|train|items|records|instances|dataset)"\s*:\s*(?=\[)'
)
_COMPRESSED_NAME = re.compile(r"\.(gz|zst|zstd)$", re.IGNORECASE)
_DELIMITED_NAME = re.compile(r"\.(csv|tsv)$", re.IGNORECASE)
_JSON_NAME = re.compile(r"\.(jsonl|ndjson|json)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RecordStream:
    """The rows of a file as they come, and what the file is.

    Attributes:
        format: ``jsonl``, ``json``, ``csv``, ``tsv``, ``text``, ``parquet``, ``arrow`` or empty.
        container: ``gzip``, ``zstd`` or empty.
        evidence: One sentence that says why.
    """

    format: str
    container: str
    evidence: str
    _read: Callable[[], Iterator[Record | RowFinding]]

    def __iter__(self) -> Iterator[Record | RowFinding]:
        """Yield records, and findings for what is none; a file that breaks ends with a finding."""
        is_empty = True
        try:
            for item in self._read():
                is_empty = False
                yield item
        except UnreadableError as error:
            yield error.fault.finding(error.line)
            return
        if is_empty:
            yield empty_file()


def empty_file() -> RowFinding:
    return Fault(
        "empty_file",
        "the file has no rows.",
        hint='Write one JSON object a line, e.g. {"messages": […]}.',
    ).finding(1)


def open_records(path: Path, name: str = "", limits: Limits = DEFAULT_LIMITS) -> RecordStream:
    """Return the rows of a file; nothing is raised for a bad one, its findings are among the rows.

    Args:
        path: A local file.
        name: The name that it was given by a person.
        limits: What reading it may cost.
    """
    container = ""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        container = containers.container_of(head)
        if container:
            head = _head_of(containers.read_chunks(path, container, limits))
            if containers.container_of(head):
                raise UnreadableError(
                    Fault(
                        "unsupported_format",
                        "the file is compressed twice.",
                        hint="Decompress it once.",
                    )
                )
        containers.refuse_foreign(head)
        return _stream_of(path, container, head, name, limits)
    except UnreadableError as error:
        finding = error.fault.finding(error.line)
        return RecordStream("", container, "", lambda: iter([finding]))


def _head_of(chunks: Iterator[bytes]) -> bytes:
    """Return the beginning of a stream; if that breaks at once, so will the reading."""
    return next(chunks, b"")[:HEAD]


def _stream_of(path: Path, container: str, head: bytes, name: str, limits: Limits) -> RecordStream:
    def stream(
        kind: str, why: str, read: Callable[[], Iterator[Record | RowFinding]]
    ) -> RecordStream:
        packed = f", packed with {container}" if container else ""
        return RecordStream(kind, container, f"The file is {kind}{packed}: {why}.", read)

    if head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        if container:
            what = "a columnar file inside another container cannot be read from its end."
            raise UnreadableError(Fault("unsupported_format", what, hint="Decompress it once."))
        if head.startswith(PARQUET):
            return stream("parquet", "it begins with PAR1", lambda: read_parquet(path, limits))
        is_stream = head.startswith(ARROW_STREAM)
        return stream(
            "arrow",
            "it begins like an Arrow " + ("stream" if is_stream else "file"),
            lambda: read_arrow(path, limits, is_stream=is_stream),
        )
    wide = wide_encoding(head)
    if wide:
        raise UnreadableError(not_utf8_at_all(wide))

    def chunks() -> Iterator[bytes]:
        return containers.without_mark(containers.read_chunks(path, container, limits))

    size = limits.max_row_bytes
    offset = len(BOM) if head.startswith(BOM) else 0
    text = head.removeprefix(BOM)
    plain_name = _COMPRESSED_NAME.sub("", name)
    wrapped = _WRAPPED.match(text)
    if wrapped and not _is_one_row_a_line(text):
        return stream(
            "json",
            f"an object whose {wrapped[1].decode()!r} is an array of rows",
            lambda: read_json_values(chunks(), size, in_array=True, prefix=wrapped.end()),
        )
    if text.lstrip().startswith(b"[") and not _is_one_row_a_line(text):
        return stream("json", "one array", lambda: read_json_values(chunks(), size, in_array=True))
    if _looks_like_json(text) or (_JSON_NAME.search(plain_name) and not _has_columns(text)):
        if _is_spread(text):
            return stream(
                "json",
                "objects over several lines, one after another",
                lambda: read_json_values(chunks(), size, in_array=False),
            )
        return stream(
            "jsonl", "one JSON value a line", lambda: read_json_lines(chunks(), size, offset)
        )
    if not text.strip():
        return RecordStream("", container, "", lambda: iter(()))
    delimiter = _delimiter(text, plain_name)
    if delimiter:
        kind = DELIMITERS[delimiter]
        return stream(
            kind,
            f"columns separated by {delimiter!r}",
            lambda: read_delimited(chunks(), delimiter, size),
        )
    return stream("text", "neither JSON nor columns", lambda: read_plain_text(chunks(), size))


def _first_lines(text: bytes, count: int = 20) -> list[bytes]:
    """Return the first lines that are not blank; the last one may be cut off."""
    return [line for line in text.split(b"\n", 4 * count) if line.strip()][:count]


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _is_one_row_a_line(text: bytes) -> bool:
    """Whether each of the first two lines is a JSON value of its own."""
    first = _first_lines(text, 3)
    return len(first) > 1 and _is_json(first[0]) and not first[1].strip().startswith((b",", b"]"))


def _looks_like_json(text: bytes) -> bool:
    """Whether most of the first lines begin like a JSON object, or the first line is JSON."""
    first = _first_lines(text)
    if not first:
        return False
    n_objects = sum(line.lstrip().startswith((b"{", b"[")) for line in first)
    begins = text.lstrip().startswith((b"{", b'"'))
    return 2 * n_objects > len(first) or (begins and (_is_json(first[0]) or _is_spread(text)))


def _is_spread(text: bytes) -> bool:
    """Whether an object begins on the first line and goes on below."""
    first = _first_lines(text, 3)
    if len(first) < 2 or not first[0].lstrip().startswith(b"{") or _is_json(first[0]):
        return False
    return first[0].strip() == b"{" or first[1].lstrip().startswith((b'"', b"}"))


def _has_columns(text: bytes) -> bool:
    return bool(_delimiter(text, ""))


def _delimiter(text: bytes, name: str) -> str:
    lines = text.decode(errors="replace")
    if len(text) == HEAD:
        lines = lines.rpartition("\n")[0] or lines
    return delimiter_of(lines, is_named_so=bool(_DELIMITED_NAME.search(name)))
