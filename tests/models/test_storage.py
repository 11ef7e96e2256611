"""One contract for every object store, kept by files on disk and by a real S3 server."""

import gc
import hashlib
import os
import stat
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from models.errors import UnavailableError
from models.settings import StorageSettings
from models.storage import (
    ABANDONED_SECONDS,
    LocalStore,
    ObjectExistsError,
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
    RemoteStore,
    fetch_file,
    open_store,
    put_file,
    sha256_file,
)

MEBIBYTE = 1024**2
HOSTILE_KEYS = [
    "",
    ".",
    "..",
    "../x",
    "a/../../x",
    "a/./b",
    "/abs",
    "a/",
    "a//b",
    "a\0b",
    "a\nb",
    "a\n",
    "a b",
    "a\\b",
    "%2e%2e/x",
    "a?b",
    "a#1",
    "é",
    ".incoming/x",
    "a/.hidden",
    "-flag",
    "x" * 201,
    "/".join("a" * 11),
]


@pytest.fixture(params=["local", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> StorageSettings:
    """An empty store: a fresh directory, or a fresh prefix of the session's bucket."""
    if request.param == "local":
        return StorageSettings(url=f"file:{tmp_path / 'objects'}")
    shared: StorageSettings = request.getfixturevalue("seaweedfs")
    return shared.model_copy(update={"url": f"{shared.url}/{uuid.uuid4().hex}"})


@pytest.fixture
def store(settings: StorageSettings) -> ObjectStore:
    return open_store(settings)


def keys_in(store: ObjectStore, prefix: str) -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_returns_what_was_put(store: ObjectStore) -> None:
    store.put("a/b.bin", b"\x00\xff content")
    assert store.get("a/b.bin") == b"\x00\xff content"
    assert b"".join(store.stream("a/b.bin")) == b"\x00\xff content"


def test_keeps_an_empty_object(store: ObjectStore) -> None:
    store.put("a/empty", b"")
    store.put("a/no-chunks", iter(()))
    assert store.get("a/empty") == store.get("a/no-chunks") == b""
    assert store.list("a") == [ObjectInfo("a/empty", 0), ObjectInfo("a/no-chunks", 0)]


def test_joins_the_chunks_of_an_iterator(store: ObjectStore) -> None:
    store.put("a", (b"x" * size for size in (1, 0, 3, 70_000)))
    assert store.get("a") == b"x" * 70_004


def test_is_there_after_the_store_is_opened_again(
    store: ObjectStore, settings: StorageSettings
) -> None:
    store.put("files/one", b"1")
    assert open_store(settings).get("files/one") == b"1"


def test_lists_sizes_in_order_of_keys(store: ObjectStore) -> None:
    for key in ("jobs/b/2", "jobs/a", "jobs/b/10", "other"):
        store.put(key, key.encode())
    assert store.list("jobs") == [
        ObjectInfo("jobs/a", 6),
        ObjectInfo("jobs/b/10", 9),
        ObjectInfo("jobs/b/2", 8),
    ]


def test_lists_no_sibling_that_only_begins_alike(store: ObjectStore) -> None:
    for key in ("a/1", "ab/1", "a.b/1", "a-b"):
        store.put(key, b"")
    assert keys_in(store, "a") == ["a/1"]


def test_lists_nothing_below_an_object_or_an_unknown_prefix(store: ObjectStore) -> None:
    store.put("a", b"")
    assert store.list("a") == []
    assert store.list("b/c") == []


def test_lists_more_than_one_page_of_s3(store: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put(f"many/{i:04d}", b""), range(1010)))
    assert keys_in(store, "many") == [f"many/{i:04d}" for i in range(1010)]


def test_deletes_one_object_and_nothing_else(store: ObjectStore) -> None:
    store.put("a/b", b"1")
    store.put("a/bc", b"2")
    store.delete("a/b")
    with pytest.raises(ObjectNotFoundError):
        store.get("a/b")
    assert keys_in(store, "a") == ["a/bc"]


def test_deleting_what_is_not_there_is_no_error(store: ObjectStore) -> None:
    store.put("a/b/c", b"1")
    for key in ("x", "a/x", "a/b/c/d", "a/b"):
        store.delete(key)
    assert store.get("a/b/c") == b"1"


@pytest.mark.parametrize("key", ["x", "a", "a/x", "a/b/c"])
def test_a_missing_key_is_reported_before_the_first_chunk(store: ObjectStore, key: str) -> None:
    store.put("a/b", b"1")
    with pytest.raises(ObjectNotFoundError, match=key):
        store.get(key)
    with pytest.raises(ObjectNotFoundError, match=key):
        store.stream(key)


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_refuses_a_hostile_key_everywhere(store: ObjectStore, key: str) -> None:
    calls = [
        lambda: store.put(key, b""),
        lambda: store.put(key, b"", create_only=True),
        lambda: store.get(key),
        lambda: store.stream(key),
        lambda: store.list(key),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no valid object key"):
            call()


def test_replaces_an_object_as_a_whole(store: ObjectStore) -> None:
    """Readers that race with writers see one version or the other, complete, and never none."""
    versions = [bytes([65 + i]) * 300_000 for i in range(4)]
    store.put("a", versions[0])
    done = threading.Event()

    def read() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(store.get("a"))
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for _ in range(5):
                for version in versions:
                    store.put("a", [version[:100_000], version[100_000:]])
        finally:
            done.set()
        seen = set().union(*(reader.result() for reader in readers))
    assert seen <= set(versions)
    assert store.get("a") == versions[-1]


def test_create_only_refuses_a_taken_key_and_leaves_it_alone(store: ObjectStore) -> None:
    store.put("a/b", b"first", create_only=True)
    with pytest.raises(ObjectExistsError, match="a/b"):
        store.put("a/b", iter([b"second"]), create_only=True)
    assert store.get("a/b") == b"first"
    store.put("a/b", b"third")
    assert store.get("a/b") == b"third"


def test_create_only_has_one_winner_among_16_threads(store: ObjectStore) -> None:
    barrier = threading.Barrier(16)

    def create(writer: int) -> bool:
        barrier.wait()
        try:
            store.put("race/manifest", f"writer {writer}".encode(), create_only=True)
        except ObjectExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert store.get("race/manifest") == f"writer {won.index(True)}".encode()


@pytest.mark.parametrize("n_chunks", [1, 40])
def test_an_interrupted_write_leaves_no_object(store: ObjectStore, n_chunks: int) -> None:
    def broken() -> Iterator[bytes]:
        yield from (b"x" * MEBIBYTE for _ in range(n_chunks))
        raise ConnectionAbortedError("the client went away")

    with pytest.raises(ConnectionAbortedError, match="the client went away"):
        store.put("a/new", broken())
    assert store.list("a") == []
    with pytest.raises(ObjectNotFoundError):
        store.get("a/new")

    store.put("a/old", b"old")
    with pytest.raises(ConnectionAbortedError):
        store.put("a/old", broken())
    assert store.get("a/old") == b"old"


def test_a_stream_that_nobody_reads_leaves_no_file_open(store: ObjectStore) -> None:
    """Else a client that goes away before the first chunk leaves the file to the collector."""
    store.put("unread", b"data")
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always", ResourceWarning)
        store.stream("unread")
        gc.collect()
    assert complaints == []
    assert not any(file.path.endswith("unread") for file in psutil.Process().open_files())


def test_streams_a_large_object_in_bounded_memory(store: ObjectStore) -> None:
    """A buffered object would show as at least its own size, 96 MiB."""
    process = psutil.Process()
    block = os.urandom(MEBIBYTE)
    n_chunks = 96
    sent = hashlib.sha256()
    received = hashlib.sha256()
    before = process.memory_info().rss
    peak = before

    def source() -> Iterator[bytes]:
        nonlocal peak
        for index in range(n_chunks):
            chunk = index.to_bytes(8) + block[8:]
            sent.update(chunk)
            peak = max(peak, process.memory_info().rss)
            yield chunk

    store.put("large", source())
    assert store.list("large") == []
    for chunk in store.stream("large"):
        assert len(chunk) <= 16 * MEBIBYTE
        received.update(chunk)
        peak = max(peak, process.memory_info().rss)
    assert received.hexdigest() == sent.hexdigest()
    assert peak - before < 72 * MEBIBYTE
    store.delete("large")


def test_copies_files_and_refuses_another_content(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    target = tmp_path / "target"
    source.write_bytes(os.urandom(3 * MEBIBYTE + 17))
    put_file(store, "files/one", source)
    fetch_file(store, "files/one", target, sha256=sha256_file(source))
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(ValueError, match="expected 0000"):
        fetch_file(store, "files/one", target, sha256="0000")
    assert not target.exists()


def test_local_writes_are_fsynced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    calls: list[str] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append(f"directory {path}" if is_directory else path.parts[0])
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.put("a/b/c", b"1")
    assert calls == [".incoming", "directory .", "directory a", "directory a/b"]
    calls.clear()
    store.put("a/b/c", b"2")
    assert calls == [".incoming", "directory a/b"]
    calls.clear()
    store.delete("a/b/c")
    assert calls == ["directory a/b"]


def test_a_second_local_writer_does_not_rely_on_a_directory_that_may_not_be_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have created the directory and not yet have fsynced its name."""
    store = LocalStore(tmp_path)
    (tmp_path / "a").mkdir()
    synced = []
    monkeypatch.setattr(
        "models.storage.fsync_directory", lambda path: synced.append(path.relative_to(tmp_path))
    )
    store.put("a/b", b"1")
    assert synced == [Path("."), Path("a")]


def test_opening_a_local_store_removes_only_old_leftovers(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    incoming = tmp_path / ".incoming"
    (incoming / "running").write_bytes(b"x")
    (incoming / "abandoned").write_bytes(b"x")
    long_ago = time.time() - ABANDONED_SECONDS - 60
    os.utime(incoming / "abandoned", (long_ago, long_ago))
    os.utime(tmp_path / "a", (long_ago, long_ago))
    assert LocalStore(tmp_path).get("a") == b"1"
    assert [path.name for path in incoming.iterdir()] == ["running"]


def test_local_files_are_readable_by_their_owner_and_leave_no_temporary(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    with pytest.raises(ObjectExistsError):
        store.put("a", b"2", create_only=True)
    assert list((tmp_path / ".incoming").iterdir()) == []


@pytest.mark.parametrize("url", ["", "objects", "http://x", "s3:", "s3://", "s3:///prefix"])
def test_a_malformed_url_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET"):
        open_store(StorageSettings(url=url))


def test_the_url_chooses_the_store(seaweedfs: StorageSettings, tmp_path: Path) -> None:
    assert isinstance(open_store(StorageSettings(url=f"file:{tmp_path}")), LocalStore)
    assert isinstance(open_store(StorageSettings(url=f"file://{tmp_path}")), LocalStore)
    assert isinstance(open_store(seaweedfs), RemoteStore)


@pytest.mark.parametrize(
    "change", [{"url": "s3://no-such-bucket"}, {"access_key_id": "unknown"}, {"endpoint": None}]
)
def test_a_remote_store_that_refuses_is_unavailable(
    seaweedfs: StorageSettings, change: dict[str, str | None]
) -> None:
    """A wrong bucket, a wrong key, and nobody at the address."""
    values = seaweedfs.model_dump() | change
    if "endpoint" in change:
        values["endpoint"] = "http://127.0.0.1:9"
    store = open_store(StorageSettings.model_validate(values))
    with pytest.raises(UnavailableError, match="object store"):
        store.get("a") if "url" not in change else store.list("a")
