"""Each scope opens what it names and nothing else."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.domain.access import Scope
from models.registry import tenancy
from tests.api.calls import expect

CALLS: list[tuple[str, str, set[Scope]]] = [
    ("GET", "/v1/files", {Scope.READ, Scope.TRAIN}),
    ("POST", "/v1/files", {Scope.TRAIN}),
    ("POST", "/v1/uploads", {Scope.TRAIN}),
    ("GET", "/v1/fine_tuning/jobs", {Scope.READ, Scope.TRAIN}),
    ("POST", "/v1/fine_tuning/jobs", {Scope.TRAIN}),
    ("POST", "/v1/fine_tuning/estimate", {Scope.TRAIN}),
    ("POST", "/v1/fine_tuning/jobs/ftjob-x/cancel", {Scope.TRAIN}),
    ("GET", "/v1/fine_tuning/jobs/ftjob-x/metrics", {Scope.READ, Scope.TRAIN}),
    ("GET", "/v1/models", {Scope.READ, Scope.TRAIN, Scope.INFER}),
    ("DELETE", "/v1/models/ft:x", {Scope.TRAIN}),
    ("POST", "/v1/chat/completions", {Scope.INFER}),
    ("GET", "/v1/api_keys", set()),
    ("POST", "/v1/api_keys", set()),
    ("DELETE", "/v1/api_keys/key_x", set()),
    ("GET", "/v1/projects", set()),
    ("POST", "/v1/projects", set()),
]


@pytest.mark.parametrize("scope", list(Scope))
def test_a_scope_opens_what_it_names_and_nothing_else(
    client: TestClient, database: Database, scope: Scope
) -> None:
    with database.write() as session:
        project = tenancy.create_project(session, "team", "acme")
        _, secret = tenancy.create_key(session, project.id, "scoped", [scope])
    client.headers["authorization"] = f"Bearer {secret}"
    for method, path, allowed in CALLS:
        response = client.request(method, path)
        if scope in allowed | {Scope.ADMIN, Scope.ORGANIZATION}:
            assert response.status_code not in (401, 403), (method, path)
        else:
            message = expect(response, 403, None, "insufficient_permissions")
            assert str(scope) in message


def test_every_route_under_v1_asks_for_a_scope(client: TestClient, database: Database) -> None:
    """A key that may only infer is refused on every other route of the OpenAPI document."""
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "scoped", [Scope.INFER])
    client.headers["authorization"] = f"Bearer {secret}"
    document: Any = client.get("/openapi.json").json()
    reading_models = {("get", "/v1/models"), ("get", "/v1/models/{model}")}
    inferring = ("chat", "completions", "batches", "embeddings", "fill_mask", "classify")
    refused = 0
    paths = {path: each for path, each in document["paths"].items() if path.startswith("/v1/")}
    for path, methods in paths.items():
        for method in methods:
            if path.split("/")[2] not in inferring and (method, path) not in reading_models:
                response = client.request(method, path.replace("{", "").replace("}", ""))
                assert response.status_code == 403, (method, path)
                refused += 1
    assert refused >= 25
