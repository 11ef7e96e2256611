"""``/v1/files``: what goes in comes out, and what is refused leaves nothing behind."""

import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.domain.status import JobStatus
from models.registry import jobs, tenancy
from models.tables import Project
from tests.api.calls import ROW, expect, new_job, upload
from tests.api.conftest import LIMIT


def stored(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "objects").rglob("*") if path.is_file()]


def test_content_comes_back_byte_for_byte(client: TestClient) -> None:
    content = bytes(range(256)) * 7
    file = upload(client, content, "user_data").json()
    assert file["object"] == "file"
    assert (file["bytes"], file["purpose"]) == (len(content), "user_data")
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    response = client.get(f"/v1/files/{file['id']}/content")
    assert response.content == content
    assert response.headers["content-length"] == str(len(content))


def test_only_training_files_wait_for_a_lint(client: TestClient) -> None:
    assert upload(client).json()["status"] == "uploaded"
    assert upload(client, b"anything", "batch").json()["status"] == "processed"


def test_a_file_of_exactly_the_limit_is_taken(client: TestClient) -> None:
    assert upload(client, b"x" * LIMIT).json()["bytes"] == LIMIT


@pytest.mark.parametrize(
    ("content", "purpose", "answer"),
    [
        (b"", "fine-tune", (400, "file", "empty_file")),
        (ROW, "tuning", (400, "purpose", "invalid_value")),
        (ROW, "", (400, "purpose", "missing_required_parameter")),
        (ROW, "fine-tune\x00", (400, "purpose", "invalid_value")),
        (b"x" * (LIMIT + 1), "fine-tune", (413, "file", "file_too_large")),
        (b"x" * (LIMIT + 100_000), "fine-tune", (413, None, "file_too_large")),
    ],
)
def test_a_bad_upload_leaves_neither_a_row_nor_an_object(
    client: TestClient,
    tmp_path: Path,
    content: bytes,
    purpose: str,
    answer: tuple[int, str | None, str],
) -> None:
    expect(upload(client, content, purpose), *answer)
    assert client.get("/v1/files").json()["data"] == []
    assert stored(tmp_path) == []


def test_a_form_without_its_parts_names_them(client: TestClient) -> None:
    no_file = client.post("/v1/files", data={"purpose": "batch"})
    expect(no_file, 400, "file", "missing_required_parameter")
    no_purpose = client.post("/v1/files", files={"file": ("a", ROW)})
    expect(no_purpose, 400, "purpose", "missing_required_parameter")
    expires = {"purpose": "batch", "expires_after[seconds]": "3600"}
    refused = client.post("/v1/files", data=expires, files={"file": ("a", ROW)})
    expect(refused, 400, "expires_after", "unsupported_parameter")


@pytest.mark.parametrize(
    "header", ["multipart/form-data", "multipart/form-data; boundary=abc", "text/plain"]
)
def test_a_body_that_is_no_form_is_400(client: TestClient, header: str) -> None:
    response = client.post("/v1/files", content=b"zzz", headers={"content-type": header})
    assert response.status_code == 400, response.text
    assert sorted(response.json()["error"]) == ["code", "message", "param", "type"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\rows.jsonl", "rows.jsonl"),
        ("Übung \N{SNOWMAN}.jsonl", "Übung \N{SNOWMAN}.jsonl"),
        ("a; filename=b", "a; filename=b"),
        ("..", "upload"),
        ("nul.jsonl", "upload"),
        ("x" * 1000, "x" * 255),
    ],
)
def test_a_file_name_is_only_shown(
    client: TestClient, tmp_path: Path, name: str, shown: str
) -> None:
    sent = {"file": (name, ROW)}
    file = client.post("/v1/files", files=sent, data={"purpose": "fine-tune"}).json()
    assert file["filename"] == shown
    response = client.get(f"/v1/files/{file['id']}/content")
    disposition = response.headers["content-disposition"]
    kind, _, quoted = disposition.partition("; filename*=UTF-8''")
    assert (kind, unquote(quoted)) == ("attachment", shown)
    assert not set(quoted) & set('"; /\\')
    (only,) = stored(tmp_path)
    assert file["id"] in str(only)


def pages(client: TestClient, url: str, **query: Any) -> list[list[str]]:
    """Follow the pages of a list as the SDK does; return the ids of each."""
    found: list[list[str]] = []
    while True:
        page = client.get(url, params=query).json()
        ids = [item["id"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
        found.append(ids)
        if not page["has_more"]:
            return found
        query["after"] = ids[-1]


def test_pages_have_no_gap_no_double_and_an_end(client: TestClient) -> None:
    ids = [upload(client).json()["id"] for _ in range(5)]
    down = pages(client, "/v1/files", limit=2)
    assert [len(page) for page in down] == [2, 2, 1]
    assert sorted(chain.from_iterable(down)) == sorted(ids)
    up = pages(client, "/v1/files", limit=5, order="asc")
    assert up == [list(chain.from_iterable(down))[::-1]]


def test_an_empty_list_has_no_ids(client: TestClient) -> None:
    assert client.get("/v1/files").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("after=file-x", "after"),
        ("after=", "after"),
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=99999999999999999999", "limit"),
        ("order=up", "order"),
    ],
)
def test_a_bad_query_names_its_parameter(client: TestClient, query: str, param: str) -> None:
    expect(client.get(f"/v1/files?{query}"), 400, param, "invalid_value")


def test_a_list_is_filtered_by_purpose_also_across_pages(client: TestClient) -> None:
    wanted = [upload(client, ROW, "batch").json()["id"] for _ in range(3)]
    other = upload(client, ROW, "evals").json()["id"]
    found = pages(client, "/v1/files", limit=1, purpose="batch")
    assert sorted(chain.from_iterable(found)) == sorted(wanted)
    expect(client.get(f"/v1/files?purpose=batch&after={other}"), 400, "after", "invalid_value")


def test_a_file_of_another_project_does_not_exist(client: TestClient, database: Database) -> None:
    file_id = upload(client).json()["id"]
    own = client.headers["authorization"]
    with database.write() as session:
        session.add(Project(id="proj_other", name="other"))
        session.flush()
        _, foreign = tenancy.create_key(session, "proj_other", "foreign")
    client.headers["authorization"] = f"Bearer {foreign}"
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        response = client.request(method, f"/v1/files/{file_id}{path}")
        expect(response, 404, "file_id", "file_not_found")
    assert client.get("/v1/files").json()["data"] == []
    expect(client.get(f"/v1/files?after={file_id}"), 400, "after", "invalid_value")
    client.headers["authorization"] = own
    assert client.get(f"/v1/files/{file_id}/content").content == ROW


def test_a_deleted_file_is_gone_with_its_bytes(client: TestClient, tmp_path: Path) -> None:
    file_id = upload(client).json()["id"]
    path = f"/v1/files/{file_id}"
    assert client.delete(path).json() == {"id": file_id, "object": "file", "deleted": True}
    for response in (client.get(path), client.get(f"{path}/content"), client.delete(path)):
        expect(response, 404, "file_id", "file_not_found")
    assert stored(tmp_path) == []


def test_a_file_in_use_stays_until_the_job_has_ended(
    client: TestClient, database: Database
) -> None:
    job = new_job(client).json()
    path = f"/v1/files/{job['training_file']}"
    assert job["id"] in expect(client.delete(path), 400, "file_id", "file_in_use")
    assert client.get(f"{path}/content").content == ROW
    with database.write() as session:
        assert jobs.move(session, job["id"], JobStatus.FAILED)
    assert client.delete(path).json()["deleted"]


def test_a_file_whose_bytes_are_gone_says_so(client: TestClient, tmp_path: Path) -> None:
    file_id = upload(client).json()["id"]
    for path in stored(tmp_path):
        path.unlink()
    response = client.get(f"/v1/files/{file_id}/content")
    assert "object store" in expect(response, 404, "file_id", "file_not_found")


def objects(tmp_path: Path, folder: str = "files") -> list[Path]:
    return [path for path in (tmp_path / "objects" / folder).rglob("*") if path.is_file()]


def send(client: TestClient, data: bytes, **fields: str) -> Any:
    form = {"purpose": "fine-tune"} | fields
    return client.post("/v1/files", files={"file": ("rows.jsonl", data)}, data=form)


def test_the_same_content_is_one_object_until_its_last_file_goes(
    client: TestClient, tmp_path: Path
) -> None:
    first, second = (send(client, ROW + b"\n").json()["id"] for _ in range(2))
    other = send(client, ROW + b"\n\n").json()["id"]
    assert first != second
    assert len(objects(tmp_path)) == 2
    client.delete(f"/v1/files/{first}")
    assert client.get(f"/v1/files/{second}/content").content == ROW + b"\n"
    assert len(objects(tmp_path)) == 2
    client.delete(f"/v1/files/{second}")
    assert [path.name for path in objects(tmp_path)] == [other]


def test_findings_and_the_cleaned_copy_can_be_downloaded(
    client: TestClient, lint: Any, tmp_path: Path
) -> None:
    file_id = send(client, ROW + b"{\n" + ROW + b"[]").json()["id"]
    for kind in ("report", "cleaned"):
        expect(
            client.get(f"/v1/files/{file_id}/{kind}"), 400, param="file_id", code="file_not_linted"
        )
    lint()
    found = client.get(f"/v1/files/{file_id}/report")
    assert [json.loads(line)["code"] for line in found.text.splitlines()] == [
        "invalid_json",
        "not_an_object",
        "duplicate_row",
    ]
    assert "rows.jsonl.findings.jsonl" in found.headers["content-disposition"]
    cleaned = client.get(f"/v1/files/{file_id}/cleaned")
    assert cleaned.content == ROW + ROW
    assert len(objects(tmp_path, "datasets")) == 3
    client.delete(f"/v1/files/{file_id}")
    assert objects(tmp_path, "datasets") == []


def test_a_clean_file_is_its_own_cleaned_copy(client: TestClient, lint: Any) -> None:
    file_id = send(client, ROW).json()["id"]
    lint()
    assert client.get(f"/v1/files/{file_id}/report").content == b""
    assert client.get(f"/v1/files/{file_id}/cleaned").content == ROW


def test_a_file_without_a_usable_row_has_no_cleaned_copy(client: TestClient, lint: Any) -> None:
    file_id = send(client, b"{").json()["id"]
    lint()
    expect(client.get(f"/v1/files/{file_id}/cleaned"), 400, param="file_id", code="no_usable_row")


def test_how_rows_are_read_can_be_said_before_and_after(
    client: TestClient, lint: Any, tmp_path: Path
) -> None:
    data = json.dumps({"dialogue": json.loads(ROW)["messages"]}).encode()
    file_id = send(client, data).json()["id"]
    lint()
    assert client.get(f"/v1/files/{file_id}").json()["status"] == "error"
    body = {"columns": {"messages": "dialogue"}}
    again = client.post(f"/v1/files/{file_id}/lint", json=body)
    assert again.json()["status"] == "uploaded"
    assert objects(tmp_path, "datasets") == []
    lint()
    assert client.get(f"/v1/files/{file_id}").json()["report"]["shape"] == "openai_chat"
    said = send(client, data, columns='{"messages": "dialogue"}').json()["id"]
    lint()
    assert client.get(f"/v1/files/{said}").json()["status"] == "processed"


@pytest.mark.parametrize("columns", ["{", "[1]", '{"messages": 3}'])
def test_columns_in_a_wrong_form_are_refused(client: TestClient, columns: str) -> None:
    response = send(client, ROW, columns=columns)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("columns")
