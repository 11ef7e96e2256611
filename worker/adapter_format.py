"""The published form of an adapter: which files it has, its digest, its manifest.

An adapter in the object store is ``adapters/{digest}/`` with the files of `ADAPTER_FILES` (PEFT's
LoRA layout) and ``manifest.json``. The trainer writes this form and the inference server reads it.
"""

import re
from pathlib import Path

from pydantic import ValidationError

from models.domain.adapter_files import ADAPTER_FILES, digest_of_files
from models.domain.reports import AdapterManifest, ManifestFile
from models.errors import UnprocessableError
from models.storage import MANIFEST, ObjectStore, adapter_prefix, fetch_file, put_file, sha256_file

__all__ = ["ADAPTER_FILES", "digest_of_files"]  # defined where the API can read them too

_DIGEST = re.compile(r"[0-9a-f]{40}")


def is_digest(value: str) -> bool:
    """Tell whether `value` has the form of an adapter digest: 40 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(value) is not None


def digest_of(directory: Path) -> tuple[str, list[ManifestFile]]:
    """Return the digest of the adapter in `directory` and its files, in order of their names.

    Raises:
        UnprocessableError: one of `ADAPTER_FILES` is missing.
    """
    files = []
    for name in sorted(ADAPTER_FILES):
        path = directory / name
        if not path.is_file():
            raise invalid_adapter("missing_file", f"it has no file {name!r}")
        files.append(
            ManifestFile(name=name, bytes=path.stat().st_size, sha256=sha256_file(path)),
        )
    return digest_of_files(files), files


def write_manifest(directory: Path, manifest: AdapterManifest) -> Path:
    """Write `manifest` beside the adapter's files and return its path."""
    path = directory / MANIFEST
    path.write_text(manifest.model_dump_json(indent=2))
    return path


def read_manifest(directory: Path) -> AdapterManifest:
    """Read the manifest in `directory`; raises as `parse_manifest`, or `FileNotFoundError`."""
    return parse_manifest((directory / MANIFEST).read_bytes())


def parse_manifest(data: bytes) -> AdapterManifest:
    """Return a manifest that is consistent in itself: its files are the two, its digest is theirs.

    Raises:
        UnprocessableError: it is not, or `data` is no manifest at all.
    """
    try:
        manifest = AdapterManifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise invalid_adapter("bad_manifest", f"{where} in its manifest: {first['msg']}") from error
    names = sorted(file.name for file in manifest.files)
    if names != sorted(ADAPTER_FILES):
        raise invalid_adapter("bad_manifest", f"its manifest lists {names}, not {ADAPTER_FILES}")
    if (digest := digest_of_files(manifest.files)) != manifest.digest:
        raise invalid_adapter(
            "digest_mismatch",
            f"its files have digest {digest}, its manifest says {manifest.digest}",
        )
    return manifest


def put_adapter(store: ObjectStore, directory: Path, manifest: AdapterManifest) -> None:
    """Store the adapter in `directory` under its digest: tensors first, the manifest last."""
    prefix = adapter_prefix(manifest.digest)
    for file in manifest.files:
        put_file(store, f"{prefix}/{file.name}", directory / file.name)
    store.put(f"{prefix}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())


def fetch_adapter(store: ObjectStore, digest: str, directory: Path) -> AdapterManifest:
    """Fetch an adapter's files into `directory`; every sha256 is compared.

    Raises:
        ObjectNotFoundError: an object is missing.
        UnprocessableError: its manifest is inconsistent.
        ValueError: a file or the whole is not what its digest says.
    """
    prefix = adapter_prefix(digest)
    manifest = parse_manifest(store.get(f"{prefix}/{MANIFEST}"))
    if manifest.digest != digest:
        raise ValueError("its adapter is another one")
    directory.mkdir(parents=True, exist_ok=True)
    for file in manifest.files:
        fetch_file(store, f"{prefix}/{file.name}", directory / file.name, sha256=file.sha256)
    return manifest


def invalid_adapter(reason: str, detail: str) -> UnprocessableError:
    """Return the error of an adapter that cannot be served; `reason` is a stable code."""
    return UnprocessableError(
        f"The adapter cannot be loaded ({reason}): {detail}. Train or publish it again.",
        param="model",
        code="invalid_adapter",
    )
