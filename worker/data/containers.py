"""From a file on disk to its bytes: decompressed as a stream, with limits that stop a bomb."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from worker.data.records import Fault

CHUNK = 1 << 20
HEAD = 1 << 16
MAX_ROW_BYTES = 8 << 20
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_REFUSED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "a ZIP archive (or an Office document)"),
    (0, b"PK\x05\x06", "an empty ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\xfd7zXZ\x00", "an xz file"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file"),
    (257, b"ustar", "a tar archive"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (0, b"SQLite format 3\x00", "an SQLite database"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy file"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
    (0, b"GGUF", "a GGUF model"),
)
_PICKLE = tuple(b"\x80" + bytes([version]) for version in (2, 3, 4, 5))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may cost at most.

    `max_ratio` is the size of what comes out over the size of what is on disk; it counts once
    `free_bytes` are out, so that small files may compress as well as they like.
    """

    max_bytes: int = 20 << 30
    max_ratio: int = 100
    free_bytes: int = 64 << 20
    max_rows: int = 50_000_000
    max_row_bytes: int = MAX_ROW_BYTES


DEFAULT_LIMITS = Limits()


class UnreadableError(Exception):
    """A file that cannot be read, or not beyond `line`."""

    def __init__(self, fault: Fault, line: int = 1) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.line = line


class Budget:
    """Adds up what a file has given and stops it when that is out of all proportion."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._size = max(1, path.stat().st_size)
        self._limits = limits
        self._given = 0

    def take(self, n_bytes: int) -> None:
        """Count bytes that have come out. Raises `UnreadableError` beyond a limit."""
        self._given += n_bytes
        limits = self._limits
        if self._given > limits.max_bytes:
            raise UnreadableError(
                Fault(
                    "decompressed_too_large",
                    f"the content has more than {limits.max_bytes:,} bytes.",
                    hint="Split the file.",
                )
            )
        if self._given > max(limits.free_bytes, limits.max_ratio * self._size):
            raise UnreadableError(
                Fault(
                    "decompressed_too_large",
                    f"{self._size:,} bytes have become more than {self._given:,}, over "
                    f"{limits.max_ratio} times as many.",
                    hint="Upload it uncompressed, if the data are really so repetitive.",
                )
            )


def container_of(head: bytes) -> str:
    """Return ``gzip``, ``zstd`` or an empty string, from the first bytes of a file."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def refuse_foreign(head: bytes) -> None:
    """Raise `UnreadableError` for a kind of file that is known and never holds training rows."""
    for at, magic, name in _REFUSED:
        if head[at : at + len(magic)] == magic:
            raise UnreadableError(_foreign(name))
    if head.startswith(_PICKLE) and b"\n" not in head[:2]:
        raise UnreadableError(_foreign("a Python pickle, which could run code"))


def _foreign(name: str) -> Fault:
    return Fault(
        "unsupported_format",
        f"the file is {name}, not a data set.",
        hint="Upload JSON lines, JSON, CSV, TSV, Parquet, Arrow or text; gzip and zstd are fine.",
    )


def read_chunks(path: Path, container: str, limits: Limits) -> Iterator[bytes]:
    """Yield the content of a file in chunks of at most 1 MiB, decompressed.

    Raises:
        UnreadableError: a limit is exceeded, or the compressed data are damaged or cut off.
    """
    if not container:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
        return
    import pyarrow as pa

    budget = Budget(path, limits)
    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, container) as stream:
        while True:
            try:
                chunk = stream.read(CHUNK)
            except OSError as error:
                raise UnreadableError(
                    Fault(
                        "truncated_file",
                        f"the {container} data are damaged or end too early: {error}.",
                        hint="Compress the file again, and compare its size after the upload.",
                    )
                ) from error
            if not chunk:
                return
            budget.take(len(chunk))
            yield chunk


def without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield chunks without the UTF-8 byte order mark that a file may begin with."""
    first = next(chunks, b"")
    while len(first) < len(codecs.BOM_UTF8) and (more := next(chunks, b"")):
        first += more
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from chunks
