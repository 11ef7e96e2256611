"""Uploads are linted once, and what the lint made of them is in the store."""

import json
from pathlib import Path

import pytest

from models.registry import files
from models.storage import upload_key
from models.tables import File
from tests.worker.training.service import PROJECT, Service, chat_rows
from worker.lint_files import FileLinter


@pytest.fixture
def service(tmp_path: Path, tiny_model: Path) -> Service:
    return Service.create(tmp_path, tiny_model)


def add(service: Service, file_id: str, data: bytes | None, purpose: str = "fine-tune") -> None:
    if data is not None:
        service.store.put(upload_key(file_id), data)
    with service.database.write() as session:
        file = File(
            id=file_id,
            project_id=PROJECT,
            purpose=purpose,
            filename="rows.jsonl",
            bytes=1,
            sha256="",
            object_key=upload_key(file_id),
        )
        files.create(session, file)


def linted(service: Service, file_id: str) -> File:
    linter = FileLinter(service.database, service.store, service.settings.worker)
    assert linter.lint_next()
    assert not linter.lint_next()
    with service.database.read() as session:
        return session.get_one(File, file_id)


def lines(rows: list[object]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def test_a_clean_file_is_processed_and_its_rows_are_kept(service: Service) -> None:
    add(service, "file-a", lines([*chat_rows(3)]))
    file = linted(service, "file-a")
    assert (file.status, file.status_details) == ("processed", None)
    assert file.report is not None
    assert (file.report["n_valid_rows"], file.report["shape"]) == (3, "openai_chat")
    assert file.rows_key is not None
    assert service.keys("datasets") == [file.rows_key]
    assert file.data_sha256


def test_a_faulty_file_names_its_lines_and_has_a_cleaned_copy(service: Service) -> None:
    rows: list[object] = [*chat_rows(2), {}, chat_rows(3)[2], 7]
    add(service, "file-a", lines(rows))
    file = linted(service, "file-a")
    assert file.status == "error"
    assert file.status_details is not None
    assert "Line 3" in file.status_details
    assert "Line 5" in file.status_details
    assert file.cleaned_key is not None
    assert file.findings_key is not None
    assert service.store.get(file.cleaned_key) == lines([*rows[:2], rows[3]]) + b"\n"
    found = [json.loads(line)["line"] for line in service.store.get(file.findings_key).splitlines()]
    assert found == [3, 5]


def test_content_that_is_gone_is_told(service: Service) -> None:
    add(service, "file-a", None)
    file = linted(service, "file-a")
    assert file.status == "error"
    assert "gone from the object store" in (file.status_details or "")


def test_only_data_sets_are_linted(service: Service) -> None:
    add(service, "file-a", b"x", purpose="user_data")
    linter = FileLinter(service.database, service.store, service.settings.worker)
    assert not linter.lint_next()


def test_a_lint_that_comes_too_late_leaves_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(service, "file-a", lines([*chat_rows(2)]))
    monkeypatch.setattr(files, "record_report", lambda *_: False)
    linter = FileLinter(service.database, service.store, service.settings.worker)
    assert linter.lint_next()
    assert service.keys("datasets") == []
