"""An adapter as one file: a zip archive of PEFT's two files, out of the service and into it."""

import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from models.domain.adapter_files import ADAPTER_FILES, digest_of_files
from models.domain.reports import ManifestFile
from models.errors import InvalidRequestError, PayloadTooLargeError, UnprocessableError
from models.storage import MANIFEST, ObjectNotFoundError, ObjectStore, adapter_prefix, sha256_file

CHUNK = 1024 * 1024
IN_MEMORY = 8 * CHUNK
MAX_ENTRIES = 16
IGNORED = (MANIFEST, "README.md")


def pack(store: ObjectStore, digest: str) -> Iterator[bytes]:
    """Yield a zip archive of an adapter's files and manifest; its tensors are not compressed.

    Raises:
        UnprocessableError: the store lacks one of them (before anything is yielded).
    """
    spool = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 (closed by the generator)
    try:
        with zipfile.ZipFile(spool, "w", zipfile.ZIP_STORED) as archive:
            for name in (*ADAPTER_FILES, MANIFEST):
                with archive.open(name, "w", force_zip64=True) as entry:
                    for chunk in store.stream(f"{adapter_prefix(digest)}/{name}"):
                        entry.write(chunk)
    except ObjectNotFoundError as error:
        spool.close()
        raise UnprocessableError(
            f"The store lacks a file of this adapter: {error}.", param="model", code="missing_file"
        ) from error
    return _read(spool)


def _read(spool: IO[bytes]) -> Iterator[bytes]:
    with spool:
        spool.seek(0)
        while chunk := spool.read(CHUNK):
            yield chunk


def unpack(content: IO[bytes], directory: Path, limit: int) -> tuple[str, list[ManifestFile]]:
    """Write the two files of an archive to `directory`; return their digest and themselves.

    Entries may stand in one folder. No entry is written but under the two known names.

    Raises:
        InvalidRequestError: it is no zip archive, or not just the files of an adapter.
        PayloadTooLargeError: unpacked, they have more than `limit` bytes.
    """
    try:
        with zipfile.ZipFile(content) as archive:
            for name, entry in _entries(archive).items():
                limit -= _extract(archive, entry, directory / name, limit)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, struct.error) as error:
        raise _invalid(f"it cannot be read as a zip archive ({error})") from error
    files = [
        ManifestFile(
            name=name,
            bytes=(directory / name).stat().st_size,
            sha256=sha256_file(directory / name),
        )
        for name in sorted(ADAPTER_FILES)
    ]
    return digest_of_files(files), files


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > MAX_ENTRIES:
        raise _invalid(f"it has {len(entries)} entries")
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.name in IGNORED:
            continue
        if path.name not in ADAPTER_FILES or len(path.parts) > 2 or ".." in path.parts:
            raise _invalid(f"{entry.filename[:100]!r} is none of {', '.join(ADAPTER_FILES)}")
        if path.name in found:
            raise _invalid(f"it has two files {path.name!r}")
        if entry.flag_bits & 0x1:
            raise _invalid(f"{path.name!r} is encrypted")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _invalid(f"{path.name!r} is neither stored nor deflated")
        found[path.name] = entry
    for name in ADAPTER_FILES:
        if name not in found:
            raise _invalid(f"it has no file {name!r}")
    return found


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, limit: int) -> int:
    """Write one entry, counting what really comes and not what the archive says."""
    n_bytes = 0
    with archive.open(entry) as source, target.open("wb") as out:
        while chunk := source.read(CHUNK):
            n_bytes += len(chunk)
            if n_bytes > limit:
                raise PayloadTooLargeError(
                    "Unpacked, the adapter is larger than this service accepts.", param="file"
                )
            out.write(chunk)
    return n_bytes


def _invalid(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The file is no adapter: {why}. Send a zip archive of {' and '.join(ADAPTER_FILES)}, as "
        "PEFT's save_pretrained writes them.",
        param="file",
        code="invalid_adapter",
    )
