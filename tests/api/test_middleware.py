"""Every answer has a request id, and no unexpected error shows what it was."""

import pytest
from fastapi.testclient import TestClient

from tests.api.calls import chat, expect, upload
from tests.api.conftest import LIMIT

IDS = "x-request-id"


def test_every_answer_has_its_own_request_id_and_its_time(client: TestClient) -> None:
    responses = [
        client.get("/healthz"),
        client.get("/v1/models"),
        client.get("/v1/nothing"),
        client.put("/v1/files"),
        chat(client, n=0),
        chat(client),
        upload(client, b"x" * (LIMIT + 1)),
        upload(client, b"x" * (LIMIT + 100_000)),
        client.get("/v1/models", headers={"authorization": "Bearer bad"}),
    ]
    assert [response.status_code for response in responses] == [
        *(200, 200, 404, 405, 400, 503, 413, 413, 401)
    ]
    ids = [response.headers[IDS] for response in responses]
    assert all(value.startswith("req_") for value in ids)
    assert len(set(ids)) == len(ids)
    assert all(int(response.headers["openai-processing-ms"]) >= 0 for response in responses)
    assert {response.headers["x-content-type-options"] for response in responses} == {"nosniff"}


def test_a_clients_own_request_id_is_not_taken_over(client: TestClient) -> None:
    response = client.get("/v1/models", headers={IDS: "forged\tlog"})
    assert response.headers[IDS].startswith("req_")


def test_an_unexpected_error_has_openais_body_and_shows_no_trace(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("models.registry.base_models.active", broken)
    response = client.get("/v1/models")
    assert "request id" in expect(response, 500, None, "internal_error")
    for leak in ("secret detail", "RuntimeError", "Traceback", ".py"):
        assert leak not in response.text
    monkeypatch.undo()
    assert client.get("/v1/models").status_code == 200


def test_an_error_in_a_write_rolls_back_what_it_wrote(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("after the row was added")

    file_id = upload(client).json()["id"]
    monkeypatch.setattr("models.registry.events.begin", broken)
    body = {"model": "base", "training_file": file_id}
    expect(client.post("/v1/fine_tuning/jobs", json=body), 500, None, "internal_error")
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_a_json_body_over_its_own_limit_is_413(client: TestClient) -> None:
    content = "x" * (4 * 1024**2)
    response = chat(client, messages=[{"role": "user", "content": content}])
    expect(response, 413, None, "file_too_large")


def test_a_json_body_larger_than_an_upload_may_be_is_fine(client: TestClient) -> None:
    response = chat(client, messages=[{"role": "user", "content": "x" * (LIMIT + 200_000)}])
    expect(response, 503, "model", "no_inference_server")
