"""The OpenAI contract at its edges: bad input gets a clear 4xx and loses nothing."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.domain.status import JobStatus
from models.registry import jobs, tenancy
from models.tables import Job, Project
from tests.api.calls import ROW, chat, expect, new_job, upload
from tests.api.conftest import LIMIT


@pytest.mark.parametrize("header", [None, "Bearer nonsense", "Basic abc"])
def test_no_valid_key_is_401(client: TestClient, header: str | None) -> None:
    del client.headers["authorization"]
    headers = {} if header is None else {"authorization": header}
    expect(client.get("/v1/models", headers=headers), 401, None, "invalid_api_key")


def test_a_revoked_key_is_401(client: TestClient, database: Database) -> None:
    with database.write() as session:
        tenancy.revoke_key(session, tenancy.list_keys(session)[0].id)
    expect(client.get("/v1/models"), 401, None, "invalid_api_key")


def test_unknown_url_and_wrong_method_have_openais_body(client: TestClient) -> None:
    expect(client.get("/v1/nothing"), 404, None, "unknown_url")
    expect(client.put("/v1/files"), 405, None, "method_not_allowed")


def test_an_uploaded_file_comes_back_as_it_was_and_can_be_deleted(client: TestClient) -> None:
    file = upload(client).json()
    assert (file["bytes"], file["status"], file["object"]) == (len(ROW), "uploaded", "file")
    assert client.get(f"/v1/files/{file['id']}/content").content == ROW
    assert client.delete(f"/v1/files/{file['id']}").json()["deleted"]
    expect(client.get(f"/v1/files/{file['id']}"), 404, "file_id", "file_not_found")


def test_bad_uploads_are_refused_and_leave_nothing(client: TestClient) -> None:
    expect(upload(client, purpose="tuning"), 400, "purpose", "invalid_value")
    expect(upload(client, b""), 400, "file", "empty_file")
    expect(upload(client, b"x" * (LIMIT + 1)), 413, "file", "file_too_large")
    expect(upload(client, b"x" * (LIMIT + 100_000)), 413, None, "file_too_large")
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\\b.jsonl", "x" * 1000, "\u202eevil\r\n"])
def test_hostile_file_names_are_only_shown_cleaned(client: TestClient, name: str) -> None:
    response = client.post("/v1/files", files={"file": (name, ROW)}, data={"purpose": "fine-tune"})
    shown = response.json()["filename"]
    assert 0 < len(shown) <= 255
    assert not set(shown) & set("/\\\r\n\u202e")


def test_lists_are_paged_without_end_or_gap(client: TestClient) -> None:
    ids = [upload(client).json()["id"] for _ in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = client.get("/v1/files", params=query).json()
        seen += [file["id"] for file in page["data"]]
        assert page["last_id"] == page["data"][-1]["id"]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert sorted(seen) == sorted(ids)
    assert len(seen) == 5
    expect(client.get("/v1/files?after=file-x"), 400, "after", "invalid_value")


def test_a_job_is_created_while_the_broker_is_down(client: TestClient) -> None:
    response = new_job(client, metadata={"team": "a"}, suffix="s", seed=3)
    job = response.json()
    assert response.status_code == 200, job
    assert (job["status"], job["object"]) == ("validating_files", "fine_tuning.job")
    assert job["peft"]["type"] == "lora"
    assert job["precision"] == {"type": "nf4", "double_quant": True}
    assert [event["sequence"] for event in events(client, job["id"])] == [2, 1]
    found = client.get("/v1/fine_tuning/jobs", params={"metadata[team]": "a"}).json()["data"]
    assert [row["id"] for row in found] == [job["id"]]
    assert client.get("/v1/fine_tuning/jobs?metadata=null").json()["data"] == []


def events(client: TestClient, job_id: str) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = client.get(f"/v1/fine_tuning/jobs/{job_id}/events").json()["data"]
    return data


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        ({"model": "gpt-4"}, "model", "model_not_found", "base"),
        ({"sufix": "x"}, "sufix", "unknown_parameter", "Did you mean 'suffix'"),
        ({"suffix": "a:b"}, "suffix", "invalid_value", "pattern"),
        ({"seed": 2**31}, "seed", "invalid_value", "less than"),
        ({"seed": 2**70}, "seed", "invalid_value", "integer"),
        ({"seed": True}, "seed", "invalid_value", "integer"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "invalid_value", "64"),
        ({"peft": {"type": "lora", "r": 0}}, "peft.r", "invalid_value", "greater"),
        ({"peft": {"rank": 8}}, "peft.rank", "unknown_parameter", "Unknown field"),
        ({"precision": {"type": "int3"}}, "precision.type", "invalid_value", "nf4"),
        ({"model": "a\u0000b"}, "model", "invalid_value", "NUL"),
        ({"method": {"type": "reinforcement"}}, "method.type", "invalid_value", "supervised"),
    ],
)
def test_bad_job_fields_name_themselves(
    client: TestClient, fields: dict[str, Any], param: str, code: str, words: str
) -> None:
    assert words in expect(new_job(client, **fields), 400, param, code)
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_files_that_cannot_be_trained_on_are_refused(
    client: TestClient, database: Database
) -> None:
    other = upload(client, purpose="user_data").json()["id"]
    expect(new_job(client, training_file=other), 400, "training_file", "invalid_file_purpose")
    expect(new_job(client, training_file="file-x"), 404, "training_file", "file_not_found")
    with database.write() as session:
        session.add(Project(id="proj_other", name="other"))
        session.flush()
        _, foreign = tenancy.create_key(session, "proj_other", "foreign")
    hidden = upload(client).json()["id"]
    client.headers["authorization"] = f"Bearer {foreign}"
    expect(client.get(f"/v1/files/{hidden}"), 404, "file_id", "file_not_found")
    expect(new_job(client, validation_file=hidden), 404, "validation_file", "file_not_found")


def test_a_file_in_use_stays(client: TestClient) -> None:
    job = new_job(client).json()
    used = f"/v1/files/{job['training_file']}"
    expect(client.delete(used), 400, "file_id", "file_in_use")
    assert client.get(f"{used}/content").content == ROW
    assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
    assert client.delete(used).json()["deleted"]


def test_a_job_is_cancelled_once(client: TestClient) -> None:
    path = f"/v1/fine_tuning/jobs/{new_job(client).json()['id']}/cancel"
    headers = {"content-type": "application/json"}  # as the SDK sends it: a type and no body
    assert client.post(path, headers=headers).json()["status"] == "cancelled"
    message = expect(client.post(path), 400, "fine_tuning_job_id", "job_not_cancellable")
    assert "already ended" in message


def test_a_finished_or_a_cancelling_job_cannot_be_cancelled(
    client: TestClient, database: Database
) -> None:
    job_id = new_job(client).json()["id"]
    with database.write() as session:
        jobs.move(session, job_id, JobStatus.QUEUED)
        jobs.move(session, job_id, JobStatus.RUNNING)
    path = f"/v1/fine_tuning/jobs/{job_id}/cancel"
    assert client.post(path).json()["cancel_requested"]
    expect(client.post(path), 400, "fine_tuning_job_id", "job_not_cancellable")
    with database.write() as session:
        jobs.move(session, job_id, JobStatus.SUCCEEDED)
    expect(client.post(path), 400, "fine_tuning_job_id", "job_not_cancellable")
    with database.read() as session:
        assert session.get_one(Job, job_id).status == "succeeded"


def test_base_models_can_be_seen_but_not_deleted(client: TestClient) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base"]
    expect(client.delete("/v1/models/base"), 400, "model", "model_not_deletable")
    expect(client.get("/v1/models/ft:meta%2Fllama:x::1"), 404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 1_000_000}, "n", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_token": 3}, "max_token", "unknown_parameter"),
    ],
)
def test_bad_chat_fields_name_themselves(
    client: TestClient, fields: dict[str, Any], param: str, code: str
) -> None:
    expect(chat(client, **fields), 400, param, code)


def test_an_unknown_model_is_never_answered_by_the_base(client: TestClient) -> None:
    expect(chat(client, model="ft:base:local::nothing1"), 404, "model", "model_not_found")


def test_without_an_inference_server_the_client_is_told_to_come_back(client: TestClient) -> None:
    response = chat(client, stream=None, stop=None)
    expect(response, 503, "model", "no_inference_server")
    assert 0 < int(response.headers["retry-after"]) <= 120


def test_malformed_and_deep_bodies_are_400(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    for body in (b"{not json", b"[" * 50_000):
        response = client.post("/v1/fine_tuning/jobs", content=body, headers=headers)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_unexpected_error_shows_an_id_and_no_trace(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("models.registry.base_models.active", broken)
    response = client.get("/v1/models")
    assert "secret detail" not in expect(response, 500, None, "internal_error")
