"""``/v1/api_keys``: made, shown once, of one project alone, revoked at once."""

import time

from fastapi.testclient import TestClient
from sqlalchemy import update

from models.db import Database
from models.registry import tenancy
from models.tables import ApiKey, Project
from tests.api.calls import expect

URL = "/v1/api_keys"


def test_a_key_is_told_once_works_and_ends_when_revoked(client: TestClient) -> None:
    made = client.post(URL, json={"name": "ci"}).json()
    listed = client.get(URL).json()["data"]
    assert [key["name"] for key in listed] == ["test", "ci"]
    assert all("value" not in key for key in listed)
    assert made["value"].startswith(listed[1]["prefix"])
    headers = {"authorization": f"Bearer {made['value']}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    revoked = client.delete(f"{URL}/{made['id']}").json()
    assert revoked["revoked_at"] is not None
    expect(client.get("/v1/models", headers=headers), 401, None, "invalid_api_key")


def test_a_key_cannot_shut_itself_out(client: TestClient) -> None:
    (own,) = client.get(URL).json()["data"]
    expect(client.delete(f"{URL}/{own['id']}"), 400, "key_id", "key_in_use")
    assert client.get(URL).status_code == 200


def test_keys_of_another_project_are_neither_seen_nor_revoked(
    client: TestClient, database: Database
) -> None:
    with database.write() as session:
        session.add(Project(id="proj_other", name="other"))
        session.flush()
        key, secret = tenancy.create_key(session, "proj_other", "theirs")
        key_id = key.id
    assert [key["name"] for key in client.get(URL).json()["data"]] == ["test"]
    expect(client.delete(f"{URL}/{key_id}"), 404, "id", "not_found")
    headers = {"authorization": f"Bearer {secret}"}
    assert [key["name"] for key in client.get(URL, headers=headers).json()["data"]] == ["theirs"]


def test_a_key_needs_a_name(client: TestClient) -> None:
    expect(client.post(URL, json={"name": ""}), 400, "name", "invalid_value")
    expect(client.post(URL, json={}), 400, "name", "missing_required_parameter")


def test_a_key_has_the_scopes_and_the_end_that_were_asked_for(client: TestClient) -> None:
    end = int(time.time()) + 3600
    body = {"name": "ci", "scopes": ["read", "infer", "read"], "expires_at": end}
    made = client.post(URL, json=body).json()
    assert (made["scopes"], made["expires_at"]) == (["read", "infer"], end)
    headers = {"authorization": f"Bearer {made['value']}"}
    assert client.get("/v1/files", headers=headers).status_code == 200
    expect(client.get(URL, headers=headers), 403, None, "insufficient_permissions")


def test_a_key_that_has_expired_is_401(client: TestClient, database: Database) -> None:
    made = client.post(URL, json={"name": "ci", "expires_at": int(time.time()) + 3600}).json()
    headers = {"authorization": f"Bearer {made['value']}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    with database.write() as session:
        session.execute(
            update(ApiKey).where(ApiKey.id == made["id"]).values(expires_at=time.time() - 1)
        )
    expect(client.get("/v1/models", headers=headers), 401, None, "invalid_api_key")


def test_unknown_scopes_and_past_ends_are_refused(client: TestClient) -> None:
    wrong = client.post(URL, json={"name": "ci", "scopes": ["write"]})
    expect(wrong, 400, "scopes[0]", "invalid_value")
    expect(client.post(URL, json={"name": "ci", "scopes": []}), 400, "scopes", "invalid_value")
    past = client.post(URL, json={"name": "ci", "expires_at": 1})
    assert "future" in expect(past, 400, "expires_at", "invalid_value")


def test_a_key_may_have_its_own_rates(client: TestClient) -> None:
    made = client.post(URL, json={"name": "ci", "requests_per_minute": 5}).json()
    assert (made["requests_per_minute"], made["tokens_per_minute"]) == (5, None)
    wrong = client.post(URL, json={"name": "ci", "requests_per_minute": 0})
    expect(wrong, 400, "requests_per_minute", "invalid_value")
