"""``/v1/projects``: one's own is shown; the default project makes others, with their first key."""

from fastapi.testclient import TestClient

from models.db import Database
from models.registry import usage
from models.registry.usage import Used, User
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


def test_an_organisations_key_sees_makes_and_counts_what_is_of_its_organisation(
    client: TestClient, database: Database
) -> None:
    first = client.post(URL, json={"name": "first", "organization": "acme"}).json()
    other = client.post(URL, json={"name": "other", "organization": "rival"}).json()
    client.post(f"{URL}/{first['id']}", json={"limits": {"max_bytes": 100}})
    keys = f"{URL}/{first['id']}/api_keys"
    body = {"name": "boss", "scopes": ["organization"]}
    theirs = {"authorization": f"Bearer {first['api_key']['value']}"}
    refused = client.post("/v1/api_keys", json=body, headers=theirs)
    assert "itself" in expect(refused, 403, None, "insufficient_permissions")
    boss = client.post(keys, json=body).json()
    client.headers["authorization"] = f"Bearer {boss['value']}"

    second = client.post(URL, json={"name": "second"}).json()
    assert (second["organization"], second["limits"]["max_bytes"]) == ("acme", 100)
    assert [each["name"] for each in client.get(URL).json()["data"]] == ["first", "second"]
    for fields in ({"organization": "rival"}, {"limits": {"max_bytes": None}}):
        wrong = client.post(URL, json={"name": "third", **fields})
        expect(wrong, 403, None, "insufficient_permissions")
    limits = client.post(f"{URL}/{second['id']}", json={"limits": {"share": 9}})
    expect(limits, 403, None, "insufficient_permissions")

    path = f"{URL}/{second['id']}/api_keys"
    made = client.post(path, json={"name": "ci", "scopes": ["read"]}).json()
    assert made["project_id"] == second["id"]
    assert [key["name"] for key in client.get(path).json()["data"]] == ["first key", "ci"]
    assert client.delete(f"{path}/{made['id']}").json()["revoked_at"] is not None
    for method in ("GET", "POST"):
        answer = client.request(method, f"{URL}/{other['id']}/api_keys", json={"name": "x"})
        expect(answer, 404, "project_id", "not_found")
    theirs_now = f"{URL}/{other['id']}/api_keys/{other['api_key']['id']}"
    expect(client.delete(theirs_now), 404, "project_id", "not_found")
    log = {"authorization": f"Bearer {second['api_key']['value']}"}
    entries = client.get("/v1/audit_logs", headers=log).json()["data"]
    assert [entry["type"] for entry in entries] == [
        "api_key.deleted",
        "api_key.created",
        "api_key.created",
    ]
    assert entries[0]["actor"]["api_key"]["id"] == boss["id"]

    with database.write() as session:
        for at, project in enumerate((first, second, other), start=1):
            user = User(project["id"], None, "base")
            usage.add(session, [(user, Used(trained_tokens=10**at))])
    query: dict[str, str | bool] = {"all_projects": True, "group_by": "project_id"}
    results = client.get("/v1/usage", params=query).json()["data"][0]["results"]
    counted = {each["project_id"]: each["trained_tokens"] for each in results}
    assert counted == {first["id"]: 10, second["id"]: 100}
    own = client.get("/v1/usage", params=query, headers=log).json()["data"][0]["results"]
    assert [each["project_id"] for each in own] == [second["id"]]


def test_only_a_project_of_an_organisation_has_a_key_for_it(client: TestClient) -> None:
    body = {"name": "boss", "scopes": ["organization"]}
    refused = client.post("/v1/api_keys", json=body)
    assert "no organisation" in expect(refused, 400, "scopes", "invalid_value")
