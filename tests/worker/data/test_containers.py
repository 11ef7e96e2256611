"""Compressed files are read as streams, bombs are stopped, foreign files are named."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from worker.data.containers import Limits, UnreadableError, read_chunks, refuse_foreign

DATA = b"".join(b'{"row": %d}\n' % number for number in range(2000))
SMALL = Limits(max_bytes=1 << 20, max_ratio=100, free_bytes=1 << 16)


def packed(kind: str, data: bytes) -> bytes:
    if kind == "gzip":
        return gzip.compress(data)
    return bytes(pa.compress(data, codec=kind, asbytes=True)) if kind else data


@pytest.mark.parametrize("kind", ["", "gzip", "zstd"])
def test_content_comes_back_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(packed(kind, DATA))
    assert b"".join(read_chunks(path, kind, Limits())) == DATA


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_several_members_are_one_stream(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(packed(kind, DATA[:100]) + packed(kind, DATA[100:]))
    assert b"".join(read_chunks(path, kind, Limits())) == DATA


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize(
    "limits", [SMALL, Limits(max_bytes=1 << 21, max_ratio=10**6)], ids=["ratio", "size"]
)
def test_a_bomb_is_stopped_before_it_is_large(tmp_path: Path, kind: str, limits: Limits) -> None:
    path = tmp_path / "x"
    path.write_bytes(packed(kind, bytes(64 << 20)))
    n_bytes = 0
    with pytest.raises(UnreadableError) as stopped:  # noqa: PT012
        for chunk in read_chunks(path, kind, limits):
            n_bytes += len(chunk)
    assert stopped.value.fault.code == "decompressed_too_large"
    assert n_bytes <= 1 << 21


def test_a_small_file_may_compress_as_well_as_it_likes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(packed("gzip", bytes(1 << 20)))
    assert sum(map(len, read_chunks(path, "gzip", Limits()))) == 1 << 20


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_file_that_is_cut_off_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(packed(kind, DATA)[:-20])
    with pytest.raises(UnreadableError) as cut:
        list(read_chunks(path, kind, Limits()))
    assert cut.value.fault.code == "truncated_file"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"PK\x03\x04....", "ZIP"),
        (b"%PDF-1.7", "PDF"),
        (b"SQLite format 3\x00", "SQLite"),
        (b"\x80\x04\x95", "pickle"),
        (bytes(257) + b"ustar", "tar"),
        (b"GGUF....", "GGUF"),
    ],
)
def test_foreign_files_are_refused_by_name(head: bytes, name: str) -> None:
    with pytest.raises(UnreadableError, match=name) as refused:
        refuse_foreign(head)
    assert refused.value.fault.code == "unsupported_format"
    assert refused.value.fault.hint
