"""Calls that many tests of the API make, and the check of its error bodies."""

import json
from collections.abc import Sequence
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


def batch_line(custom_id: str, **fields: Any) -> Any:
    """Return one request of a batch."""
    body = {"model": "base", "messages": [{"role": "user", "content": custom_id}], **fields}
    url = "/v1/chat/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def new_batch(client: TestClient, lines: Sequence[Any] = (), **fields: Any) -> httpx2.Response:
    """Upload lines (bytes or objects) and make a batch of them."""
    lines = lines or [batch_line("only")]
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    file = upload(client, b"\n".join(texts), purpose="batch").json()["id"]
    body = {
        "input_file_id": file,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        **fields,
    }
    return client.post("/v1/batches", json=body)


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
