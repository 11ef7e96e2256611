"""Estimates over HTTP: what is missing is said and wished for. Whole ones: tests/flow."""

from typing import Any

from fastapi.testclient import TestClient

from models.db import Database
from models.registry import probes
from tests.api.calls import expect, upload

URL = "/v1/fine_tuning/estimate"


def ask(client: TestClient, file_id: str, **changes: Any) -> Any:
    return client.post(URL, json={"model": "base", "training_file": file_id, **changes})


def test_a_file_must_be_checked_and_have_a_usable_row(client: TestClient, lint: Any) -> None:
    file_id = upload(client, b"{").json()["id"]
    expect(ask(client, file_id), 400, "training_file", "file_not_linted")
    lint()
    expect(ask(client, file_id), 400, "training_file", "no_usable_row")


def test_a_base_model_that_was_not_measured_is_going_to_be(
    client: TestClient, lint: Any, database: Database
) -> None:
    file_id = upload(client).json()["id"]
    lint()
    response = ask(client, file_id, precision={"type": "bf16"})
    expect(response, 503, "model", "not_measured_yet")
    assert int(response.headers["retry-after"]) > 0
    with database.write() as session:
        row = probes.claim(session, 60)
        assert row is not None
        assert (row.base_model, row.precision) == ("base", "bf16")
        probes.record_failure(session, row, "It is damaged.")
    message = expect(
        ask(client, file_id, precision={"type": "bf16"}), 422, "model", "not_measurable"
    )
    assert "It is damaged." in message


def test_the_body_is_checked_as_a_jobs(client: TestClient, lint: Any) -> None:
    file_id = upload(client).json()["id"]
    lint()
    expect(ask(client, file_id, model="nothing"), 400, "model", "model_not_found")
    expect(ask(client, file_id, peft={"type": "lora", "r": -1}), 400, "peft.r", "invalid_value")
    expect(ask(client, "file-x"), 404, "training_file", "file_not_found")
