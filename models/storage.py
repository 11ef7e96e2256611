"""The object store: uploads, checkpoints, adapters. Two back ends behind one protocol.

`LocalStore` writes files itself, because obstore's local store never calls fsync; everything
remote goes through obstore. Both obey ``tests/models/test_storage.py``.

A key is ``segment/segment/…`` of safe characters, made by the service, never by a client.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from models.errors import UnavailableError
from models.settings import StorageSettings

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Store

CHUNK = 1024**2
# A streamed write to S3 holds at most PART_BYTES * PARTS_AT_A_TIME in memory; 10,000 parts are
# S3's limit, so an object may have 80 GB.
PART_BYTES = 8 * 1024**2
PARTS_AT_A_TIME = 3
ABANDONED_SECONDS = 24 * 3600
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,199}){0,9}")


class ObjectNotFoundError(LookupError):
    """No object has this key."""


class ObjectExistsError(FileExistsError):
    """A create-only write found an object under this key."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    key: str
    size: int


class ObjectStore(Protocol):
    """Durable bytes by key. After `put` returns, the bytes survive a crash of the machine."""

    def put(self, key: str, data: bytes | Iterable[bytes], *, create_only: bool = False) -> None:
        """Store `data` under `key` as one atomic object.

        Raises:
            ObjectExistsError: `create_only` is set and the key is taken.
            UnavailableError: a remote store does not answer, or refuses.
            ValueError: the key is malformed.
        """

    def get(self, key: str) -> bytes:
        """Return a whole (small) object, or raise `ObjectNotFoundError`."""

    def stream(self, key: str) -> Iterator[bytes]:
        """Return the chunks of an object, or raise `ObjectNotFoundError` at once."""

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Return all objects whose key starts with ``prefix + "/"``, in order of their keys."""

    def delete(self, key: str) -> None:
        """Remove an object; removing what is not there is no error."""


def open_store(settings: StorageSettings) -> ObjectStore:
    """Open the store that `settings.url` names; ``ValueError`` says what a URL looks like."""
    if settings.url.startswith("file:"):
        return LocalStore(Path(settings.url.removeprefix("file:").removeprefix("//")))
    if settings.url.startswith("s3://"):
        return RemoteStore(settings)
    raise ValueError(
        f"TUNERY_STORAGE__URL is {settings.url!r}; it must be 'file:DIRECTORY' or 's3://BUCKET[/PREFIX]'."
    )


def checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no valid object key.")
    return key


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable (a rename survives a crash only after this)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(data: bytes | Iterable[bytes]) -> Iterable[bytes]:
    return (data,) if isinstance(data, bytes) else data


class LocalStore:
    """Objects as files below one directory.

    A write goes to a temporary file, is fsynced, renamed into place, and its directory fsynced.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self._incoming = self.root / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._durable = {self.root}
        fsync_directory(self.root.parent)
        self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        """Remove what writers left behind that were killed in the middle of a write."""
        oldest = time.time() - ABANDONED_SECONDS
        for path in self._incoming.iterdir():
            with suppress(FileNotFoundError):  # its writer, or another opener, was faster
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def put(self, key: str, data: bytes | Iterable[bytes], *, create_only: bool = False) -> None:
        path = self._path(key)
        temporary = self._incoming / secrets.token_hex(16)
        try:
            with temporary.open("xb") as file:
                for chunk in _chunks(data):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            self._make_durable(path.parent)
            if create_only:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    raise ObjectExistsError(key) from None
            else:
                temporary.replace(path)
            fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_durable(self, directory: Path) -> None:
        """Create `directory`, and fsync its name even where another writer has just created it."""
        if directory in self._durable and directory.is_dir():
            return
        if directory != self.root:
            self._make_durable(directory.parent)
        directory.mkdir(exist_ok=True)
        fsync_directory(directory.parent)
        self._durable.add(directory)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ObjectNotFoundError(key) from None

    def stream(self, key: str) -> Iterator[bytes]:
        def read() -> Iterator[bytes]:
            try:
                file = self._path(key).open("rb")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise ObjectNotFoundError(key) from None
            with file:
                yield b""
                while chunk := file.read(CHUNK):
                    yield chunk

        chunks = read()
        # Begun here: a missing object shows at once, and only a generator that has begun closes
        # its file when the reader goes away before the first chunk.
        next(chunks)
        return chunks

    def list(self, prefix: str) -> list[ObjectInfo]:
        found = []
        for directory, _, names in os.walk(self._path(prefix)):
            for name in names:
                path = Path(directory, name)
                with suppress(FileNotFoundError):  # deleted since its name was read
                    found.append(
                        ObjectInfo(path.relative_to(self.root).as_posix(), path.stat().st_size)
                    )
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return
        fsync_directory(path.parent)


class RemoteStore:
    """Objects in an S3-compatible store, through obstore.

    A store that does not answer, or refuses, raises `UnavailableError`.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self._store = _open_s3(settings)

    def put(self, key: str, data: bytes | Iterable[bytes], *, create_only: bool = False) -> None:
        import obstore

        path = checked_key(key)
        with _translated(key):
            if create_only:  # conditional writes are one request: a condition needs all the bytes
                body = b"".join(_chunks(data))
                obstore.put(self._store, path, body, mode="create", use_multipart=False)
            else:
                obstore.put(
                    self._store,
                    path,
                    data if isinstance(data, bytes) else iter(data),
                    chunk_size=PART_BYTES,
                    max_concurrency=PARTS_AT_A_TIME,
                )

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key))

    def stream(self, key: str) -> Iterator[bytes]:
        import obstore

        path = checked_key(key)
        with _translated(key):
            result = obstore.get(self._store, path)

        def read() -> Iterator[bytes]:
            with _translated(key):
                for chunk in result.stream(min_chunk_size=CHUNK):
                    yield bytes(chunk)

        return read()

    def list(self, prefix: str) -> list[ObjectInfo]:
        import obstore

        folder = checked_key(prefix) + "/"
        with _translated(prefix):
            found = [
                ObjectInfo(meta["path"], meta["size"])
                for batch in obstore.list(self._store, prefix=folder)
                for meta in batch
            ]
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        import obstore

        path = checked_key(key)
        with suppress(ObjectNotFoundError), _translated(key):
            obstore.delete(self._store, path)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Turn the errors of obstore into those of `ObjectStore`; errors of the caller pass through."""
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        yield
    except FileNotFoundError:
        raise ObjectNotFoundError(key) from None
    except (AlreadyExistsError, PreconditionError):
        raise ObjectExistsError(key) from None
    except BaseError as error:
        raise UnavailableError(
            "The object store did not do what it was asked; try again. If it stays so, check "
            "TUNERY_STORAGE__ENDPOINT, the bucket and the keys.",
            code="object_store_unavailable",
        ) from error


def _open_s3(settings: StorageSettings) -> "S3Store":
    from obstore.store import S3Store

    url = urlsplit(settings.url)
    if not url.netloc:
        raise ValueError(
            f"TUNERY_STORAGE__URL is {settings.url!r}; an S3 URL names a bucket: 's3://BUCKET[/PREFIX]'."
        )
    secret = settings.secret_access_key
    key_id = settings.access_key_id
    config: S3Config = {"region": settings.region}
    if settings.endpoint is not None:
        config["endpoint"] = settings.endpoint
    if key_id is not None:
        config["access_key_id"] = key_id.get_secret_value()
    if secret is not None:
        config["secret_access_key"] = secret.get_secret_value()
    return S3Store(
        url.netloc,
        prefix=url.path.strip("/") or None,
        config=config,
        retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=30)},
        client_options={
            "allow_http": bool(settings.endpoint and settings.endpoint.startswith("http://"))
        },
    )


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete_tree(store: ObjectStore, prefix: str) -> None:
    """Remove every object below ``prefix + "/"``."""
    for info in store.list(prefix):
        store.delete(info.key)


def put_file(store: ObjectStore, key: str, path: Path) -> None:
    """Store a local file under `key`."""
    with path.open("rb") as file:
        store.put(key, iter(lambda: file.read(CHUNK), b""))


def fetch_file(store: ObjectStore, key: str, path: Path, *, sha256: str | None = None) -> None:
    """Write an object to a local file; ``ValueError`` if its sha256 is not the expected one.

    A chunk is hashed while it is written and the next one comes.
    """
    digest = hashlib.sha256()
    hashed: Future[None] | None = None
    with path.open("wb") as file, ThreadPoolExecutor(1, "sha256") as beside:
        for chunk in store.stream(key):
            if hashed is not None:
                hashed.result()
            hashed = beside.submit(digest.update, chunk)
            file.write(chunk)
    if sha256 is not None and digest.hexdigest() != sha256:
        path.unlink()
        raise ValueError(f"Object {key} has sha256 {digest.hexdigest()}, expected {sha256}.")


def upload_key(file_id: str) -> str:
    return f"files/{file_id}"


def part_key(upload_id: str, part_id: str) -> str:
    return f"uploads/{upload_id}/{part_id}"


def dataset_prefix(file_id: str) -> str:
    """Return the folder of what the lint makes of a file."""
    return f"datasets/{file_id}"


def token_prefix(data_sha256: str) -> str:
    """Return the folder of the tokenised rows of one content."""
    return f"tokens/{data_sha256}"


def token_key(data_sha256: str, digest: str) -> str:
    """Return where tokenised rows are kept; `digest` is ``worker.data.tokens.TokenKey``'s."""
    return f"{token_prefix(data_sha256)}/{digest}.arrow"


def adapter_prefix(digest: str) -> str:
    return f"adapters/{digest}"


def checkpoint_prefix(job_id: str, step: int, attempt: int) -> str:
    """Return the folder of one checkpoint; a stale worker's attempt writes to another folder."""
    return f"jobs/{job_id}/checkpoints/{step:08d}-a{attempt}"


MANIFEST = "manifest.json"
