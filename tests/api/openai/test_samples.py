"""Base and tuned model are asked what the job's held-out data begin with."""

import json
from typing import Any

from fastapi.testclient import TestClient

from models.db import Database
from models.domain.access import Scope
from models.registry import adapters, tenancy
from models.tables import Adapter, Job
from tests.api.calls import ROW, expect, new_job, upload
from tests.api.fake_inference import FakeInference

NAME = "ft:base:local:mine:abcdefgh"
HELD_OUT = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Kiel"},
    ]
}


def finished(client: TestClient, database: Database, lint: Any) -> str:
    """Make a job with held-out data and the adapter that it made; return its id."""
    held_out = upload(client, json.dumps(HELD_OUT).encode() + b"\n" + ROW).json()["id"]
    job_id = str(new_job(client, validation_file=held_out).json()["id"])
    lint()
    with database.write() as session:
        adapter = Adapter(
            name=NAME,
            project_id=tenancy.default_project(session).id,
            job_id=job_id,
            base_model="base",
            digest="d" * 64,
            bytes=7,
            manifest={"base_fingerprint": "f" * 64},
        )
        adapters.publish(session, adapter)
        session.get_one(Job, job_id).fine_tuned_model = NAME
    return job_id


def test_base_and_tuned_answer_the_beginnings_of_held_out_conversations(
    client: TestClient, database: Database, lint: Any, inference: FakeInference
) -> None:
    job_id = finished(client, database, lint)
    url = f"/v1/fine_tuning/jobs/{job_id}/samples"
    answer = client.post(url, json={"limit": 1, "max_tokens": 9})
    assert answer.status_code == 200, answer.text
    [sample] = answer.json()["data"]
    assert (sample["messages"], sample["wanted"]) == (HELD_OUT["messages"][:2], "Kiel")
    assert sample["answers"] == [
        {"model": model, "text": "Hello", "finish_reason": "stop"} for model in ("base", NAME)
    ]
    asked = sorted(inference.requests, key=lambda each: each.adapter is not None)
    assert [each.adapter and each.adapter.name for each in asked] == [None, NAME]
    assert {(each.sampling.max_tokens, each.sampling.temperature) for each in asked} == {(9, 0.0)}
    assert len(client.post(url, json={}).json()["data"]) == 2
    [result] = client.get("/v1/usage").json()["data"][0]["results"]
    assert (result["num_model_requests"], result["output_tokens"]) == (6, 12)

    own = [[{"role": "user", "content": "Hi"}]]
    [sample] = client.post(url, json={"prompts": own}).json()["data"]
    assert (sample["messages"], sample["wanted"]) == (own[0], None)
    wrong = client.post(url, json={"model": "ft:base:local:other:abcdefgh"})
    expect(wrong, 400, "model", "model_not_found")


def test_what_cannot_be_asked_says_why(
    client: TestClient, database: Database, lint: Any, inference: FakeInference
) -> None:
    fresh = new_job(client).json()["id"]
    url = f"/v1/fine_tuning/jobs/{fresh}/samples"
    expect(client.post(url, json={}), 400, "fine_tuning_job_id", "no_checkpoint")
    job_id = finished(client, database, lint)
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "reader", [Scope.READ])
    reader = {"authorization": f"Bearer {secret}"}
    url = f"/v1/fine_tuning/jobs/{job_id}/samples"
    refused = client.post(url, json={}, headers=reader)
    assert "'infer'" in expect(refused, 403, None, "insufficient_permissions")
    assert inference.requests == []
