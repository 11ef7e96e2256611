"""Calls that many tests of the API make, and the check of its error bodies."""

from typing import Any

import httpx2
from fastapi.testclient import TestClient

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def upload(client: TestClient, content: bytes = ROW, purpose: str = "fine-tune") -> httpx2.Response:
    return client.post(
        "/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": purpose}
    )


def new_job(client: TestClient, **fields: Any) -> httpx2.Response:
    body = {"model": "base", "training_file": upload(client).json()["id"], **fields}
    return client.post("/v1/fine_tuning/jobs", json=body)


def chat(client: TestClient, **fields: Any) -> httpx2.Response:
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return client.post("/v1/chat/completions", json=body)


def expect(response: httpx2.Response, status: int, param: str | None, code: str) -> str:
    """Check status, OpenAI's error body and the request id; return the message."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == TYPES[status]
    assert response.headers["x-request-id"].startswith("req_")
    return str(error["message"])
