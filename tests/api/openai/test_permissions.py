"""A permission opens exactly one model to one project, for calling it and nothing more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.registry import adapters, tenancy
from models.tables import Adapter
from tests.api.calls import chat, expect, new_job
from tests.api.fake_inference import FakeInference

LENT = "ft:base:local:lent:abcdefgh"
KEPT = "ft:base:local:kept:abcdefgh"


@pytest.fixture
def other(client: TestClient, database: Database) -> tuple[str, str]:
    """Another project and its key; the client's has two models."""
    with database.write() as session:
        owner = tenancy.default_project(session)
        for name in (LENT, KEPT):
            adapter = Adapter(
                name=name,
                project_id=owner.id,
                base_model="base",
                digest=name[-8:] * 5,
                bytes=7,
                manifest={"base_fingerprint": "f" * 64},
            )
            adapters.publish(session, adapter)
        project = tenancy.create_project(session, "other")
        _, secret = tenancy.create_key(session, project.id, "theirs")
        return project.id, secret


def url(model: str) -> str:
    return f"/v1/fine_tuning/checkpoints/{model}/permissions"


@contextmanager
def speaking_as(client: TestClient, secret: str) -> Iterator[None]:
    own = client.headers["authorization"]
    client.headers["authorization"] = f"Bearer {secret}"
    yield
    client.headers["authorization"] = own


def test_a_lent_model_can_be_called_and_nothing_else(
    client: TestClient, other: tuple[str, str], inference: FakeInference
) -> None:
    project_id, secret = other
    with speaking_as(client, secret):
        assert chat(client, model=LENT).status_code == 404
    made: Any = client.post(url(LENT), json={"project_ids": [project_id, project_id]}).json()
    (permission,) = made["data"]
    again = client.post(url(LENT), json={"project_ids": [project_id]}).json()
    assert again["data"] == [permission]
    with speaking_as(client, secret):
        assert chat(client, model=LENT).status_code == 200
        assert chat(client, model=KEPT).status_code == 404
        listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
        assert (set(listed), listed[LENT]["job_id"]) == ({"base", LENT}, None)
        assert client.get(f"/v1/models/{LENT}").json()["job_id"] is None
        assert client.get(f"/v1/adapters/{LENT}").status_code == 404
        assert client.delete(f"/v1/models/{LENT}").status_code == 404
        assert new_job(client, model=LENT).status_code == 404
        assert client.get(url(LENT)).status_code == 404
        lend = client.post(url(LENT), json={"project_ids": [project_id]})
        expect(lend, 404, "model", "model_not_found")
    assert client.delete(f"{url(LENT)}/{permission['id']}").json()["deleted"]
    with speaking_as(client, secret):
        assert chat(client, model=LENT).status_code == 404


def test_only_projects_that_exist_and_are_others_are_let_in(
    client: TestClient, other: tuple[str, str]
) -> None:
    own = client.get("/v1/projects").json()["data"][0]["id"]
    refused = client.post(url(LENT), json={"project_ids": [own]})
    expect(refused, 400, "project_ids[0]", "invalid_value")
    unknown = client.post(url(LENT), json={"project_ids": [other[0], "proj_x"]})
    expect(unknown, 404, "project_ids[1]", "not_found")
    assert client.get(url(LENT)).json()["data"] == []
    expect(client.delete(f"{url(LENT)}/cp_x"), 404, "permission_id", "not_found")
