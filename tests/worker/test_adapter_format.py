"""The published form of an adapter."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from models.domain.reports import AdapterManifest, ManifestFile
from models.errors import UnprocessableError
from models.storage import LocalStore
from worker.adapter_format import (
    digest_of,
    digest_of_files,
    is_digest,
    parse_manifest,
    put_adapter,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    return tmp_path


def manifest_of(directory: Path) -> AdapterManifest:
    digest, files = digest_of(directory)
    return AdapterManifest(
        digest=digest,
        files=files,
        base_model="base",
        base_fingerprint="f",
        vocab_size=1,
        template_sha256="t",
        method="lora",
        objective="sft",
        precision={"type": "nf4"},
        step=1,
        spec_sha256="s",
        data_sha256="d",
        versions={},
    )


def test_digest_is_the_documented_formula(adapter: Path) -> None:
    config, tensors = (hashlib.sha256(data).hexdigest() for data in (b"{}", b"tensors"))
    lines = f"adapter_config.json:{config}\nadapter_model.safetensors:{tensors}"
    digest, files = digest_of(adapter)
    assert digest == hashlib.sha256(lines.encode()).hexdigest()[:40]
    assert [(file.name, file.bytes, file.sha256) for file in files] == [
        ("adapter_config.json", 2, config),
        ("adapter_model.safetensors", 7, tensors),
    ]
    assert is_digest(digest)


def test_digest_ignores_the_order_of_files_and_changes_with_any_byte(adapter: Path) -> None:
    digest, files = digest_of(adapter)
    assert digest_of_files(reversed(files)) == digest
    (adapter / "adapter_config.json").write_bytes(b"{ }")
    assert digest_of(adapter)[0] != digest


def test_a_missing_file_is_named(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UnprocessableError, match=r"missing_file.*adapter_model\.safetensors"):
        digest_of(adapter)


@pytest.mark.parametrize("value", ["", "../../etc", "A" * 40, "a" * 39, "a" * 41, "a" * 40 + "\n"])
def test_what_is_no_digest_is_known_as_such(value: str) -> None:
    assert not is_digest(value)


def test_manifest_survives_writing_and_reading(adapter: Path) -> None:
    manifest = manifest_of(adapter)
    write_manifest(adapter, manifest)
    assert read_manifest(adapter) == manifest


def test_manifest_is_stored_after_the_files_it_names(adapter: Path, tmp_path: Path) -> None:
    keys: list[str] = []

    class Recorder(LocalStore):
        def put(
            self, key: str, data: bytes | Iterable[bytes], *, create_only: bool = False
        ) -> None:
            keys.append(key)

    manifest = manifest_of(adapter)
    put_adapter(Recorder(tmp_path / "objects"), adapter, manifest)
    prefix = f"adapters/{manifest.digest}"
    assert keys == [
        f"{prefix}/adapter_config.json",
        f"{prefix}/adapter_model.safetensors",
        f"{prefix}/manifest.json",
    ]


def test_manifest_with_another_digest_than_its_files_is_refused(adapter: Path) -> None:
    manifest = manifest_of(adapter).model_copy(update={"digest": "0" * 40})
    with pytest.raises(UnprocessableError, match="digest_mismatch"):
        parse_manifest(manifest.model_dump_json().encode())


def test_manifest_that_names_other_files_is_refused(adapter: Path) -> None:
    foreign = ManifestFile(name="../../evil", bytes=1, sha256="0" * 64)
    manifest = manifest_of(adapter).model_copy(update={"files": [foreign]})
    with pytest.raises(UnprocessableError, match="bad_manifest"):
        parse_manifest(manifest.model_dump_json().encode())


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": "tunery-adapter-2"}', b"\xff"])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(UnprocessableError, match="bad_manifest") as caught:
        parse_manifest(data)
    assert caught.value.code == "invalid_adapter"
