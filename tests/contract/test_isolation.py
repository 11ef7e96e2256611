"""A project never learns of another's objects: every route of the OpenAPI document is tried."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.registry import adapters, permissions, stored_completions, tenancy
from models.settings import Settings
from models.tables import Adapter, StoredCompletion
from tests.api.calls import chat, new_batch, new_job, upload
from tests.apps import app_for
from tests.contract.places import Place, bodies, changed, operations, sent

NAME = "ft:base:local:mine:abcdefgh"
WEBHOOK = {"name": "x", "url": "https://example.com/", "event_types": ["batch.completed"]}
# What a route needs to get as far as looking its object up.
REQUESTS: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/v1/uploads/{upload_id}/parts"): {"files": {"data": ("part", b"x")}},
    ("post", "/v1/uploads/{upload_id}/complete"): {"json": {"part_ids": ["part_x"]}},
    ("get", "/v1/files/{file_id}/preview"): {"params": {"model": "base"}},
    ("post", "/v1/files/{file_id}/lint"): {"json": {}},
    ("post", "/v1/fine_tuning/jobs/{job_id}/samples"): {"json": {}},
    ("post", "/v1/projects/{project_id}"): {"json": {"limits": {}}},
    ("post", "/v1/projects/{project_id}/api_keys"): {"json": {"name": "x"}},
    ("post", "/v1/fine_tuning/checkpoints/{model}/permissions"): {"json": {"project_ids": ["x"]}},
    ("post", "/v1/adapters/{model}/serve"): {"json": {"merged": True}},
    ("post", "/v1/chat/completions/{completion_id}"): {"json": {"metadata": None}},
    ("post", "/v1/webhook_endpoints/{webhook_endpoint_id}"): {"json": {}},
    ("post", "/v1/webhook_endpoints/{webhook_endpoint_id}/test"): {
        "json": {"event_type": "batch.completed"}
    },
}

# Fields of bodies that name an object, and which of the other project's they are given.
IDS = {
    "training_file": "file_id",
    "validation_file": "file_id",
    "input_file_id": "file_id",
    "model": "model",
}


@dataclass
class World:
    """A client of one project, and the ids of what another one has, by path parameter."""

    client: TestClient
    theirs: dict[str, str]


def new_sweep(client: TestClient) -> str:
    job = {"model": "base", "training_file": upload(client).json()["id"]}
    made = client.post("/v1/sweeps", json={"job": job, "grid": {"seed": [1]}})
    return str(made.json()["id"])


@pytest.fixture
def world(settings: Settings, database: Database) -> Iterator[World]:
    with database.write() as session:
        project = tenancy.default_project(session)
        key, theirs = tenancy.create_key(session, project.id, "theirs")
        other = tenancy.create_project(session, "other")
        _, own = tenancy.create_key(session, other.id, "own")
    with TestClient(app_for(settings), raise_server_exceptions=False) as client:
        client.headers["authorization"] = f"Bearer {theirs}"
        job = new_job(client).json()
        pending = {"bytes": 9, "filename": "a", "mime_type": "a/b", "purpose": "fine-tune"}
        ids = {
            "file_id": upload(client).json()["id"],
            "upload_id": client.post("/v1/uploads", json=pending).json()["id"],
            "job_id": job["id"],
            "model": NAME,
            "key_id": key.id,
            "project_id": project.id,
            "webhook_endpoint_id": client.post("/v1/webhook_endpoints", json=WEBHOOK).json()["id"],
            "delivery_id": "whd_x",
            "completion_id": "chatcmpl-theirs",
            "sweep_id": new_sweep(client),
            "batch_id": new_batch(client).json()["id"],
            "worker_id": "worker-none",  # workers are of no project: only the operator drains one
        }
        with database.write() as session:
            adapter = Adapter(
                name=NAME,
                project_id=project.id,
                job_id=job["id"],
                base_model="base",
                digest="d" * 64,
                bytes=7,
                manifest={"base_fingerprint": "f" * 64},
            )
            adapters.publish(session, adapter)
            third = tenancy.create_project(session, "third")
            (permission,) = permissions.grant(session, project.id, NAME, [third.id])
            ids["permission_id"] = permission.id
            stored = StoredCompletion(
                id="chatcmpl-theirs", project_id=project.id, model="base", request={}, completion={}
            )
            stored_completions.create(session, stored)
        client.headers["authorization"] = f"Bearer {own}"
        yield World(client, ids)


def routes(client: TestClient) -> list[tuple[str, str]]:
    paths = client.get("/openapi.json").json()["paths"]
    return [(method, path) for path in paths for method in paths[path] if path.startswith("/v1/")]


def test_anothers_ids_are_not_found_on_any_route(world: World) -> None:
    tried = 0
    for method, path in routes(world.client):
        if "{" not in path:
            continue
        url = path.format_map(world.theirs)  # an unknown parameter fails: name its object above
        answer = world.client.request(method, url, **REQUESTS.get((method, path), {}))
        assert answer.status_code == 404, (method, path, answer.text)
        tried += 1
    assert tried >= 20


def test_no_list_shows_anothers_objects(world: World) -> None:
    tried = 0
    for method, path in routes(world.client):
        if method != "get" or "{" in path:
            continue
        answer = world.client.get(path)
        assert answer.status_code == 200, path
        assert not [each for each in world.theirs.values() if each in answer.text], path
        tried += 1
    assert tried >= 5


def test_anothers_objects_cannot_be_used(world: World) -> None:
    file_id = world.theirs["file_id"]
    assert new_job(world.client, training_file=file_id).status_code == 404
    assert new_job(world.client, validation_file=file_id).status_code == 404
    assert new_job(world.client, model=NAME).status_code == 404
    assert chat(world.client, model=NAME).status_code == 404
    for route in ("embeddings", "fill_mask", "classify"):
        body = {"model": NAME, "input": "x"}
        assert world.client.post(f"/v1/{route}", json=body).status_code == 404
    text = {"model": NAME, "prompt": "a"}
    assert world.client.post("/v1/completions", json=text).status_code == 404


def test_no_body_reaches_anothers_object(world: World) -> None:
    """Each field that takes an id or a model's name is given the other project's."""
    document = world.client.get("/openapi.json").json()
    good = bodies(upload(world.client).json()["id"])
    tried = set()
    for method, path, schema in operations(document):
        for place in Place(document, schema, ()).within(document):
            kind = IDS.get(str(place.path[-1])) if place.path else None
            if kind is None or "string" not in place.types:
                continue
            body = changed(good[path], place.path, world.theirs[kind])
            answer = sent(world.client, method, path, body)
            assert answer.status_code == 404, (path, place.text, answer.text)
            tried.add((path, place.text))
    assert len(tried) >= 12
