"""``/v1/models``: base models and adapters are one namespace, but only adapters can be deleted."""

from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.registry import adapters, tenancy
from models.settings import Settings
from models.storage import adapter_prefix, open_store
from models.tables import Adapter, Project
from tests.api.calls import expect, new_job

DIGEST = "d" * 64
NAME = "ft:base:local:mine:abcdefgh"
Publish = Callable[..., str]


@pytest.fixture
def publish(client: TestClient, database: Database, settings: Settings) -> Publish:
    """Publish an adapter under a name, with one object in the store."""

    def run(name: str = NAME, digest: str = DIGEST) -> str:
        job_id = new_job(client).json()["id"]
        open_store(settings.storage).put(f"{adapter_prefix(digest)}/x", [b"weights"])
        with database.write() as session:
            adapter = Adapter(
                name=name,
                project_id=tenancy.default_project(session).id,
                job_id=job_id,
                base_model="base",
                digest=digest,
                bytes=7,
                manifest={"base_fingerprint": "f" * 64},
            )
            adapters.publish(session, adapter)
        return name

    return run


def kept(settings: Settings, digest: str = DIGEST) -> int:
    return len(list(open_store(settings.storage).list(adapter_prefix(digest))))


def names(client: TestClient) -> list[str]:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    return [model["id"] for model in body["data"]]


def test_base_models_and_adapters_are_listed_and_found(
    client: TestClient, publish: Publish
) -> None:
    assert names(client) == ["base"]
    publish()
    assert names(client) == ["base", NAME]
    base, mine = (client.get(f"/v1/models/{name}").json() for name in ("base", NAME))
    assert (base["object"], base["owned_by"], base["parent"]) == ("model", "tunery", None)
    assert (mine["root"], mine["parent"], mine["digest"]) == ("base", "base", DIGEST)
    assert mine["owned_by"].startswith("proj_")


@pytest.mark.parametrize("slash", ["/", "%2F", "%2f"])
def test_a_name_with_a_slash_is_found_however_it_is_written(
    client: TestClient, publish: Publish, slash: str
) -> None:
    name = publish("ft:org/base:local::abcdefgh")
    url = f"/v1/models/{name.replace('/', slash)}"
    assert client.get(url).json()["id"] == name
    assert client.delete(url).json() == {"id": name, "object": "model", "deleted": True}


@pytest.mark.parametrize("name", ["gpt-4", "ft:meta%2Fllama:x::1", "%00", "..%2F..", "x" * 3000])
def test_an_unknown_model_is_404(client: TestClient, name: str) -> None:
    expect(client.get(f"/v1/models/{name}"), 404, "model", "model_not_found")
    expect(client.delete(f"/v1/models/{name}"), 404, "model", "model_not_found")


def test_a_base_model_cannot_be_deleted(client: TestClient) -> None:
    expect(client.delete("/v1/models/base"), 400, "model", "model_not_deletable")
    assert names(client) == ["base"]


def test_a_deleted_model_is_gone_with_its_objects(
    client: TestClient, publish: Publish, settings: Settings
) -> None:
    url = f"/v1/models/{publish()}"
    assert kept(settings) == 1
    assert client.delete(url).json()["deleted"]
    assert names(client) == ["base"]
    assert kept(settings) == 0
    expect(client.get(url), 404, "model", "model_not_found")
    expect(client.delete(url), 404, "model", "model_not_found")


def test_content_stays_while_another_name_stands_for_it(
    client: TestClient, publish: Publish, settings: Settings
) -> None:
    first, second = publish(), publish("ft:base:local:twin:abcdefgi")
    client.delete(f"/v1/models/{first}")
    assert kept(settings) == 1
    client.delete(f"/v1/models/{second}")
    assert kept(settings) == 0


def test_a_model_of_another_project_does_not_exist(
    client: TestClient, database: Database, publish: Publish, settings: Settings
) -> None:
    url = f"/v1/models/{publish()}"
    with database.write() as session:
        session.add(Project(id="proj_other", name="other"))
        session.flush()
        _, foreign = tenancy.create_key(session, "proj_other", "foreign")
    client.headers["authorization"] = f"Bearer {foreign}"
    assert names(client) == ["base"]
    expect(client.get(url), 404, "model", "model_not_found")
    expect(client.delete(url), 404, "model", "model_not_found")
    assert kept(settings) == 1
