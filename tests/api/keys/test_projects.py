"""``/v1/projects``: one's own is shown; the default project makes others, with their first key."""

from fastapi.testclient import TestClient

from tests.api.calls import expect, new_job

URL = "/v1/projects"


def test_a_new_project_has_an_admin_key_and_sees_nothing_of_the_other(client: TestClient) -> None:
    job = new_job(client).json()
    made = client.post(URL, json={"name": "team"}).json()
    assert made["api_key"]["scopes"] == ["admin"]
    theirs = {"authorization": f"Bearer {made['api_key']['value']}"}
    listed = client.get(URL, headers=theirs).json()["data"]
    assert [(project["id"], project["name"]) for project in listed] == [(made["id"], "team")]
    assert client.get(f"{URL}/{made['id']}", headers=theirs).json() == listed[0]
    assert client.get("/v1/fine_tuning/jobs", headers=theirs).json()["data"] == []
    path = f"/v1/fine_tuning/jobs/{job['id']}"
    param = "fine_tuning_job_id"
    expect(client.get(path, headers=theirs), 404, param, "fine_tuning_job_not_found")
    expect(client.get(f"{URL}/{made['id']}"), 404, "project_id", "not_found")


def test_only_the_default_project_makes_projects(client: TestClient) -> None:
    made = client.post(URL, json={"name": "team"}).json()
    theirs = {"authorization": f"Bearer {made['api_key']['value']}"}
    refused = client.post(URL, json={"name": "third"}, headers=theirs)
    assert "default project" in expect(refused, 403, None, "insufficient_permissions")


def test_a_name_is_taken_once(client: TestClient) -> None:
    assert client.post(URL, json={"name": "team"}).status_code == 200
    expect(client.post(URL, json={"name": "team"}), 400, "name", "project_exists")
    expect(client.post(URL, json={"name": "default"}), 400, "name", "project_exists")
