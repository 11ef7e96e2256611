"""Every change by a key is in the log of its project, with who made it; no refused one is."""

from typing import Any

from fastapi.testclient import TestClient

from tests.api.calls import expect, new_job

URL = "/v1/audit_logs"


def entries(client: TestClient, **query: Any) -> list[Any]:
    data: list[Any] = client.get(URL, params=query).json()["data"]
    return data


def test_changes_are_logged_with_actor_request_and_object(client: TestClient) -> None:
    job_id = new_job(client).json()["id"]
    cancelled = client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").status_code == 400
    made = client.post("/v1/api_keys", json={"name": "ci", "scopes": ["read"]}).json()
    client.delete(f"/v1/api_keys/{made['id']}")
    (own, _) = client.get("/v1/api_keys").json()["data"]
    found = entries(client)
    assert [entry["type"] for entry in found] == [
        "api_key.deleted",
        "api_key.created",
        "fine_tuning.job.cancelled",
        "fine_tuning.job.created",
        "file.created",
    ]
    assert {entry["actor"]["api_key"]["id"] for entry in found} == {own["id"]}
    created = found[1]["api_key.created"]
    assert created == {"id": made["id"], "data": {"name": "ci", "scopes": ["read"]}}
    assert made["value"] not in str(found)
    assert found[2]["request_id"] == cancelled.headers["x-request-id"]
    assert found[2]["fine_tuning.job.cancelled"]["id"] == job_id


def test_the_log_is_filtered_and_paged(client: TestClient) -> None:
    for name in ("a", "b", "c"):
        client.post("/v1/api_keys", json={"name": name})
    new_job(client)
    keys = entries(client, **{"event_types[]": ["api_key.created"]})
    assert [entry["api_key.created"]["data"]["name"] for entry in keys] == ["c", "b", "a"]
    rest = entries(client, **{"event_types[]": "api_key.created"}, after=keys[0]["id"], limit=1)
    assert rest == [keys[1]]
    assert entries(client, **{"actor_ids[]": "key_nobody"}) == []
    expect(client.get(URL, params={"after": "audit_log-x"}), 400, "after", "invalid_value")
