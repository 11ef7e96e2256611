"""A good body for each route that takes JSON, and every place in it, from the OpenAPI document."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
from fastapi.testclient import TestClient

JsonObject = dict[str, Any]
METHODS = ("post", "put", "patch")
MARK = "\ue000"
"""Stands in a body for a text that is not JSON."""
MESSAGES = [{"role": "user", "content": "Hi"}]
GRID = {"peft.r": [4, 8]}


def bodies(file_id: str) -> dict[str, JsonObject]:
    """Return a body that is taken, for each route that has one."""
    job = {"model": "base", "training_file": file_id}
    event = {"event_type": "batch.completed"}
    hook = {"name": "x", "url": "https://example.com/", "event_types": ["batch.completed"]}
    grader = {"model": "base", "input": "a"}
    return {
        "/v1/fine_tuning/jobs": job,
        "/v1/fine_tuning/estimate": job,
        "/v1/fine_tuning/jobs/{job_id}/samples": {},
        "/v1/fine_tuning/checkpoints/{model}/permissions": {"project_ids": ["proj_x"]},
        "/v1/adapters/{model}/serve": {"merged": True},
        "/v1/chat/completions": {"model": "base", "messages": MESSAGES},
        "/v1/chat/completions/{completion_id}": {"metadata": {}},
        "/v1/completions": {"model": "base", "prompt": "a"},
        "/v1/embeddings": grader,
        "/v1/fill_mask": grader,
        "/v1/classify": grader,
        "/v1/files/{file_id}/lint": {},
        "/v1/uploads": {
            "bytes": 9,
            "filename": "a",
            "mime_type": "a/b",
            "purpose": "fine-tune",
        },
        "/v1/uploads/{upload_id}/complete": {"part_ids": ["part_x"]},
        "/v1/sweeps": {"job": job, "grid": GRID},
        "/v1/batches": {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
        "/v1/webhook_endpoints": hook,
        "/v1/webhook_endpoints/{webhook_endpoint_id}": {},
        "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": {},
        "/v1/webhook_endpoints/{webhook_endpoint_id}/test": event,
        "/v1/api_keys": {"name": "x"},
        "/v1/projects": {"name": "y"},
        "/v1/projects/{project_id}": {"limits": {}},
        "/v1/projects/{project_id}/api_keys": {"name": "x"},
    }


class Place:
    """A place in a body: its path, the types and names that it may have; none is anything."""

    def __init__(self, document: JsonObject, schema: JsonObject, path: tuple[str | int, ...]):
        self.path = path
        self.branches = list(branches(document, schema))
        self.types = {each["type"] for each in self.branches if "type" in each}
        self.is_free = any(not each.keys() & {"type", "const", "enum"} for each in self.branches)

    @property
    def text(self) -> str:
        return _text(self.path)

    @property
    def names(self) -> set[str] | None:
        """The names that an object here may have, if it is one of known names only."""
        if "object" not in self.types or self.is_free:
            return None
        objects = [each for each in self.branches if each.get("type") == "object"]
        if any(each.get("additionalProperties", True) is not False for each in objects):
            return None
        return {name for each in objects for name in each.get("properties", {})}

    def within(self, document: JsonObject) -> Iterator["Place"]:
        """This place, and all below it."""
        yield self
        for branch in self.branches:
            for name, schema in branch.get("properties", {}).items():
                yield from Place(document, schema, (*self.path, name)).within(document)
            if isinstance(branch.get("items"), dict):
                yield from Place(document, branch["items"], (*self.path, 0)).within(document)


def branches(document: JsonObject, schema: JsonObject) -> Iterator[JsonObject]:
    """The plain schemas that a value of `schema` may be of: references and unions are followed."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from branches(document, document["components"]["schemas"][name])
        return
    choices = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if choices is None:
        yield schema
        return
    for each in choices:
        yield from branches(document, each)


def _text(path: tuple[str | int, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def changed(body: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """Return a body with another value at a place, with what has to be around it."""
    if not path:
        return value
    name, *rest = path
    if isinstance(name, int):
        items = list(body) if isinstance(body, list) and body else [None]
        return [changed(items[0], tuple(rest), value), *items[1:]]
    fields = dict(body) if isinstance(body, dict) else {}
    return {**fields, name: changed(fields.get(name), tuple(rest), value)}


def operations(document: JsonObject) -> Iterator[tuple[str, str, JsonObject]]:
    """Every operation with a JSON body, and the body's schema."""
    for path, item in document["paths"].items():
        for method in METHODS:
            content = item.get(method, {}).get("requestBody", {}).get("content", {})
            if "application/json" in content and path.startswith("/v1/"):
                yield method, path, content["application/json"]["schema"]


def sent(client: TestClient, method: str, path: str, body: Any, raw: str = "") -> httpx2.Response:
    content = json.dumps(body).replace(json.dumps(MARK), raw)
    url = path.format_map(dict.fromkeys(_names(path), "x"))
    headers = {"content-type": "application/json"}
    return client.request(method, url, content=content, headers=headers)


def _names(path: str) -> list[str]:
    return [part.partition("}")[0] for part in path.split("{")[1:]]
