"""What is no JSON is refused at the edge, before anything has to encode it again."""

import pytest
from fastapi.testclient import TestClient

from tests.api.calls import expect
from tests.api.fake_inference import FakeInference

JSON = {"content-type": "application/json"}
JOB = b'{"model": "base", "training_file": "file-x", %s}'
CHAT = b'{"model": "base", "messages": [{"role": "assistant", "content": "a", %s}]}'


@pytest.mark.parametrize(
    "field",
    [
        b'"\\ud800": 1',
        b'"suffix": "\\ud800"',
        b'"peft": {"\\ud800": 1}',
        b'"peft": {"type": "\\ud800"}',
        b'"metadata": {"\\ud800": "a"}',
        b'"metadata": {"a": "\\udfff"}',
        b'"seed": NaN',
        b'"seed": -Infinity',
        b'"seed": 1e999',
        b'"suffix": "\xff"',
        b'"peft": ' + b"[" * 1025 + b"]" * 1025,
    ],
)
def test_a_job_body_that_is_no_json_is_400(client: TestClient, field: bytes) -> None:
    response = client.post("/v1/fine_tuning/jobs", content=JOB % field, headers=JSON)
    assert "JSON" in expect(response, 400, None, "invalid_json")


@pytest.mark.parametrize(
    "field", [b'"\\ud800": 1', b'"tool_calls": [{"id": "\\ud800"}]', b'"weight": NaN']
)
def test_a_conversation_that_is_no_json_reaches_no_model(
    client: TestClient, inference: FakeInference, field: bytes
) -> None:
    response = client.post("/v1/chat/completions", content=CHAT % field, headers=JSON)
    assert "JSON" in expect(response, 400, None, "invalid_json")
    assert inference.requests == []


def test_the_place_of_the_fault_is_told(client: TestClient) -> None:
    response = client.post("/v1/fine_tuning/jobs", content=b'{"model": base}', headers=JSON)
    assert "character 10" in expect(response, 400, None, "invalid_json")


def test_a_surrogate_pair_is_one_ordinary_character(
    client: TestClient, inference: FakeInference
) -> None:
    body = CHAT % b'"name": "\\ud83d\\ude00"'
    response = client.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 200, response.text
    [message] = inference.requests[0].messages or []
    assert message.name == "\N{GRINNING FACE}"
