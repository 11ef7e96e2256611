"""No JSON body is taken that says what is not meant: every field of the OpenAPI document is tried.

To each place of each body go a name that does not exist, a boolean where a number belongs, a number
where a boolean does, NUL, and what Python's parser takes though it is no JSON.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from models.db import Database
from models.registry import tenancy
from models.settings import Settings
from tests.api.calls import upload
from tests.contract.places import (
    MARK,
    JsonObject,
    Place,
    bodies,
    branches,
    changed,
    operations,
    sent,
)

NOT_JSON = ("NaN", "Infinity", "-Infinity", '"\\ud800"', "1e999")


def faults(place: Place, at_root: bool) -> Iterator[tuple[Any, str, str]]:
    """Yield what is wrong at a place: a value, its path in the error, a word of the message."""
    names = place.names
    if names:
        near = max(names, key=len) + "s"
        if near not in names:
            where = f"{place.text}.{near}" if place.text else near
            yield {near: 1}, where, "Did you mean" if len(near) > 4 else "nknown field"
    if at_root:
        return
    if not place.is_free and place.types & {"integer", "number"} and "boolean" not in place.types:
        yield True, place.text, ""
    if not place.is_free and "boolean" in place.types and not place.types & {"integer", "number"}:
        yield 1, place.text, ""
        yield "true", place.text, ""
    if place.is_free or "string" in place.types:
        yield "a\x00b", place.text, "NUL"
    if place.is_free or "object" in place.types:
        yield {"k": ["\x00"]}, f"{place.text}.k[0]", "NUL"


@pytest.fixture
def client(settings: Settings, database: Database) -> Iterator[TestClient]:
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "test")
    with TestClient(create_app(settings), raise_server_exceptions=False) as made:
        made.headers["authorization"] = f"Bearer {secret}"
        yield made


# Bodies are refused before any database is asked.
@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_no_fault_of_a_body_is_taken_and_each_is_named(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    good = bodies(upload(client).json()["id"])
    wrong, tried = [], 0
    assert {path for _, path, _ in operations(document)} == set(good)
    for method, path, schema in operations(document):
        answer = sent(client, method, path, good[path])
        code = (answer.json().get("error") or {}).get("code")
        is_taken = answer.status_code != 400 or code in ("file_not_linted", "invalid_file_purpose")
        assert is_taken, (path, answer.text)
        for place in Place(document, schema, ()).within(document):
            for value, where, word in faults(place, at_root=not place.path):
                body = {**good[path], **value} if not place.path else None
                body = body or changed(good[path], place.path, value)
                answer = sent(client, method, path, body)
                tried += 1
                error = answer.json().get("error") or {"message": "", "param": None}
                named = error["param"] == where or where in error["message"]
                if (
                    answer.status_code not in (400, 422)
                    or not named
                    or word not in error["message"]
                ):
                    wrong.append((path, place.text, value, answer.status_code, error))
        for raw in NOT_JSON:
            for name in schema_names(document, schema)[:2]:
                answer = sent(client, method, path, {**good[path], name: MARK}, raw)
                tried += 1
                code = answer.json()["error"]["code"]
                if (answer.status_code, code) != (400, "invalid_json"):
                    wrong.append((path, name, raw, answer.status_code, answer.text))
    assert wrong == []
    assert tried > 300


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_each_body_has_an_example_of_the_right_form(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for method, path, _ in operations(document):
        content = document["paths"][path][method]["requestBody"]["content"]
        answer = sent(client, method, path, content["application/json"]["example"])
        error = answer.json().get("error") or {}
        is_form = error.get("code") in ("invalid_value", "unknown_parameter", "invalid_json")
        assert not is_form, (path, error)


def schema_names(document: JsonObject, schema: JsonObject) -> list[str]:
    return [name for each in branches(document, schema) for name in each.get("properties", {})]
