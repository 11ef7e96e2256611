"""Local copies of adapters: fetched once, checked always, never of another base model."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from models.domain.generation import AdapterRef
from models.errors import ConflictError, NotFoundError, UnavailableError, UnprocessableError
from models.storage import LocalStore
from tests.worker.inference.tiny import Files, publish, shapes_of, tiny_llama
from worker.base_models import BaseModelInfo
from worker.inference.adapter_store import AdapterStore

SHAPES = shapes_of(tiny_llama())


class CountingStore(LocalStore):
    """Counts reads, and fails them when told to."""

    reads = 0
    broken = False

    def stream(self, key: str) -> Iterator[bytes]:
        self.reads += 1
        return super().stream(key)

    def get(self, key: str) -> bytes:
        if self.broken:
            raise ConnectionError("the store is away")
        self.reads += 1
        return super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "objects")


@pytest.fixture
def adapters(store: CountingStore, base: BaseModelInfo, tmp_path: Path) -> AdapterStore:
    return AdapterStore(store, tmp_path / "cache", base)


@pytest.fixture
def ref(store: CountingStore, base: BaseModelInfo, tmp_path: Path) -> AdapterRef:
    return publish(store, Files(SHAPES).write(tmp_path / "adapter"), base)


def fetch(adapters: AdapterStore, ref: AdapterRef) -> Path:
    with adapters.open(ref) as (directory, manifest):
        assert manifest.digest == ref.digest
        return directory


def object_path(store: LocalStore, ref: AdapterRef, name: str) -> Path:
    return store.root / "adapters" / ref.digest / name


def test_an_adapter_is_fetched_once_into_a_directory_of_its_digest(
    adapters: AdapterStore, store: CountingStore, ref: AdapterRef, tmp_path: Path
) -> None:
    directory = fetch(adapters, ref)
    assert directory == tmp_path / "cache" / ref.digest
    published = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (directory / "adapter_model.safetensors").read_bytes() == published
    reads = store.reads
    fetch(adapters, ref)
    assert store.reads == reads


def test_fifty_first_requests_are_one_fetch(
    adapters: AdapterStore, store: CountingStore, ref: AdapterRef
) -> None:
    together = Barrier(50)

    def ask() -> Path:
        together.wait()
        return fetch(adapters, ref)

    with ThreadPoolExecutor(50) as pool:
        results = {future.result() for future in [pool.submit(ask) for _ in range(50)]}
    assert len(results) == 1
    assert store.reads == 3  # the manifest and two files


def test_a_damaged_local_copy_is_fetched_again(
    adapters: AdapterStore, store: CountingStore, ref: AdapterRef
) -> None:
    file = fetch(adapters, ref) / "adapter_model.safetensors"
    good = file.read_bytes()
    reads = store.reads
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fetch(adapters, ref)
    assert file.read_bytes() == good
    assert store.reads == reads + 3


@pytest.mark.parametrize("name", ["adapter_config.json", "manifest.json"])
def test_a_local_copy_that_lost_a_file_is_fetched_again(
    adapters: AdapterStore, ref: AdapterRef, name: str
) -> None:
    file = fetch(adapters, ref) / name
    file.unlink()
    fetch(adapters, ref)
    assert file.exists()


@pytest.mark.parametrize("digest", ["a" * 40, "../../../etc/passwd", "", "A" * 40])
def test_an_unknown_digest_is_not_found_and_touches_nothing_else(
    adapters: AdapterStore, ref: AdapterRef, digest: str
) -> None:
    with pytest.raises(NotFoundError) as caught:
        fetch(adapters, ref.model_copy(update={"digest": digest}))
    assert caught.value.code == "model_not_found"


def test_a_reference_to_another_base_model_is_refused_with_both_names(
    adapters: AdapterStore, ref: AdapterRef, base: BaseModelInfo
) -> None:
    other = ref.model_copy(update={"base_model": "other", "base_fingerprint": "f" * 32})
    with pytest.raises(ConflictError, match=rf"'other'.*{'f' * 32}.*'tiny'.*{base.fingerprint}"):
        fetch(adapters, other)


def test_a_manifest_of_another_base_model_is_refused_even_if_the_reference_fits(
    adapters: AdapterStore, store: CountingStore, base: BaseModelInfo, tmp_path: Path
) -> None:
    directory = Files(SHAPES).write(tmp_path / "adapter")
    ref = publish(store, directory, base, base_model="other", base_fingerprint="f" * 32)
    with pytest.raises(ConflictError) as caught:
        fetch(adapters, ref)
    assert caught.value.code == "wrong_base_model"


def test_a_corrupt_object_is_refused_and_leaves_nothing_behind(
    adapters: AdapterStore, store: CountingStore, ref: AdapterRef, tmp_path: Path
) -> None:
    object_path(store, ref, "adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(UnprocessableError, match="checksum_mismatch") as caught:
        fetch(adapters, ref)
    assert caught.value.code == "invalid_adapter"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_missing_object_is_refused(
    adapters: AdapterStore, store: CountingStore, ref: AdapterRef
) -> None:
    object_path(store, ref, "adapter_config.json").unlink()
    with pytest.raises(UnprocessableError, match=r"missing_file.*adapter_config\.json"):
        fetch(adapters, ref)


def test_an_adapter_stored_under_another_digest_is_refused(
    adapters: AdapterStore, store: CountingStore, ref: AdapterRef
) -> None:
    moved = ref.model_copy(update={"digest": "b" * 40})
    object_path(store, ref, "").rename(object_path(store, moved, ""))
    with pytest.raises(UnprocessableError, match="digest_mismatch"):
        fetch(adapters, moved)


def test_a_store_that_is_away_is_no_missing_adapter(
    adapters: AdapterStore, store: CountingStore, ref: AdapterRef
) -> None:
    store.broken = True
    with pytest.raises(UnavailableError, match="ConnectionError") as caught:
        fetch(adapters, ref)
    assert caught.value.retry_after == 5


def test_the_copies_opened_least_recently_go_when_the_budget_is_spent(
    store: CountingStore, base: BaseModelInfo, tmp_path: Path
) -> None:
    refs = [
        publish(store, Files(SHAPES, seed=seed).write(tmp_path / str(seed)), base)
        for seed in range(3)
    ]
    size = sum(file.stat().st_size for file in (store.root / "adapters" / refs[0].digest).iterdir())
    adapters = AdapterStore(store, tmp_path / "cache", base, budget_bytes=int(2.5 * size))
    paths = [fetch(adapters, ref) for ref in refs[:2]]
    os.utime(paths[0], (1, 1))
    os.utime(paths[1], (2, 2))
    fetch(adapters, refs[0])
    third = fetch(adapters, refs[2])
    assert [paths[0].exists(), paths[1].exists(), third.exists()] == [True, False, True]


def test_a_copy_that_is_open_is_not_removed(
    store: CountingStore, base: BaseModelInfo, tmp_path: Path
) -> None:
    adapters = AdapterStore(store, tmp_path / "cache", base, budget_bytes=1)
    first, second = (
        publish(store, Files(SHAPES, seed=seed).write(tmp_path / str(seed)), base)
        for seed in range(2)
    )
    with adapters.open(first) as (directory, _):
        fetch(adapters, second)
        assert (directory / "adapter_model.safetensors").exists()
    assert not directory.exists()
