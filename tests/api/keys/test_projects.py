"""``/v1/projects``: one's own is shown; the default project makes others, with their first key."""

from fastapi.testclient import TestClient

from tests.api.calls import ROW, expect, new_job, upload

URL = "/v1/projects"


def test_a_new_project_has_an_admin_key_and_sees_nothing_of_the_other(client: TestClient) -> None:
    job = new_job(client).json()
    made = client.post(URL, json={"name": "team"}).json()
    assert made["api_key"]["scopes"] == ["admin"]
    theirs = {"authorization": f"Bearer {made['api_key']['value']}"}
    listed = client.get(URL, headers=theirs).json()["data"]
    assert [(project["id"], project["name"]) for project in listed] == [(made["id"], "team")]
    shown = client.get(f"{URL}/{made['id']}", headers=theirs).json()
    assert listed[0].items() <= shown.items()
    assert client.get("/v1/fine_tuning/jobs", headers=theirs).json()["data"] == []
    path = f"/v1/fine_tuning/jobs/{job['id']}"
    param = "fine_tuning_job_id"
    expect(client.get(path, headers=theirs), 404, param, "fine_tuning_job_not_found")
    own = client.get(URL).json()["data"][0]["id"]
    expect(client.get(f"{URL}/{own}", headers=theirs), 404, "project_id", "not_found")


def test_only_the_default_project_makes_projects(client: TestClient) -> None:
    made = client.post(URL, json={"name": "team"}).json()
    theirs = {"authorization": f"Bearer {made['api_key']['value']}"}
    refused = client.post(URL, json={"name": "third"}, headers=theirs)
    assert "default project" in expect(refused, 403, None, "insufficient_permissions")


def test_a_name_is_taken_once(client: TestClient) -> None:
    assert client.post(URL, json={"name": "team"}).status_code == 200
    expect(client.post(URL, json={"name": "team"}), 400, "name", "project_exists")
    expect(client.post(URL, json={"name": "default"}), 400, "name", "project_exists")


def test_only_the_operator_sets_limits_and_they_bind(client: TestClient) -> None:
    made = client.post(URL, json={"name": "team", "organization": "acme"}).json()
    assert (made["organization"], made["limits"]["max_bytes"]) == ("acme", None)
    theirs = {"authorization": f"Bearer {made['api_key']['value']}"}
    path = f"{URL}/{made['id']}"
    limits = {"limits": {"max_bytes": 100, "max_waiting_jobs": 1}}
    expect(client.post(path, json=limits, headers=theirs), 403, None, "insufficient_permissions")
    assert client.post(path, json=limits).json()["limits"]["max_bytes"] == 100
    share = client.post(path, json={"limits": {"share": 2.0}}).json()["limits"]
    assert (share["share"], share["max_bytes"]) == (2.0, 100)
    client.headers.update(theirs)
    job = new_job(client).json()
    assert client.get(path).json()["in_use"] == {
        "bytes": len(ROW),
        "waiting_jobs": 1,
        "running_jobs": 0,
        "tokens_today": len(ROW) // 4 * 3,
        "device_hours_this_month": 0.0,
    }
    again = {"model": "base", "training_file": job["training_file"]}
    refused = client.post("/v1/fine_tuning/jobs", json=again)
    assert "1 jobs" in expect(refused, 429, None, "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert "12 more bytes" in expect(upload(client), 413, "file", "quota_exceeded")
    begun = {"bytes": 99, "filename": "a", "mime_type": "a/b", "purpose": "fine-tune"}
    expect(client.post("/v1/uploads", json=begun), 413, "file", "quota_exceeded")
    assert client.post("/v1/uploads", json=begun | {"bytes": 12}).status_code == 200


def test_limits_are_checked_and_suggested(client: TestClient) -> None:
    wrong = client.post(URL, json={"name": "team", "limits": {"max_byte": 1}})
    assert "max_bytes" in expect(wrong, 400, "limits.max_byte", "unknown_parameter")
    for value in (-1, True, 1.5, "1"):
        bad = client.post(URL, json={"name": "team", "limits": {"max_bytes": value}})
        expect(bad, 400, "limits.max_bytes", "invalid_value")
