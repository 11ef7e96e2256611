"""Embeddings, gaps and classes, against an inference server on a real port."""

import base64
import struct
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.errors import InvalidRequestError
from tests.api.calls import expect
from tests.api.fake_inference import FakeInference


def post(client: TestClient, route: str, **body: Any) -> Any:
    return client.post(f"/v1/{route}", json={"model": "base", "input": "Hi", **body})


def test_vectors_come_as_numbers_or_as_base64(client: TestClient, inference: FakeInference) -> None:
    plain = post(client, "embeddings").json()
    assert plain["data"] == [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    packed = post(client, "embeddings", encoding_format="base64").json()["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == pytest.approx((0.6, 0.8))
    sent = inference.encoded[0]
    assert (sent.task, sent.inputs, sent.adapter) == ("embed", ["Hi"], None)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_inputs_are_texts_or_token_ids_one_or_many(
    client: TestClient, inference: FakeInference, given: Any, sent: Any
) -> None:
    answer = post(client, "embeddings", input=given).json()
    assert inference.encoded[0].inputs == sent
    assert [each["index"] for each in answer["data"]] == list(range(len(sent)))


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("embeddings", {"input": ""}, "input"),
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": [[]]}, "input"),
        ("embeddings", {"input": [True]}, "input"),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("embeddings", {"dimensions": 1}, "dimensions"),
        ("embeddings", {"encoding_format": "int8"}, "encoding_format"),
        ("fill_mask", {"top_k": 0}, "top_k"),
        ("fill_mask", {"input": [5]}, "input"),
        ("classify", {"labels": ["a"]}, "labels"),
    ],
)
def test_bad_fields_name_themselves(
    client: TestClient, inference: FakeInference, route: str, fields: dict[str, Any], param: str
) -> None:
    answer = post(client, route, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_gaps_and_classes_come_in_a_list(client: TestClient, inference: FakeInference) -> None:
    inference.encoding = {"text": "Hi you"}
    filled = post(client, "fill_mask", input=["Hi [MASK]", "x"], top_k=2).json()
    assert [(each["object"], each["index"]) for each in filled["data"]] == [
        ("fill_mask", 0),
        ("fill_mask", 1),
    ]
    assert filled["data"][0]["text"] == "Hi you"
    assert filled["system_fingerprint"] == "fp_fake"
    inference.encoding = {"label": "gate", "score": 0.9}
    found = post(client, "classify", input_pair="Ho").json()
    assert found["data"][0]["label"] == "gate"
    assert [each.task for each in inference.encoded] == ["fill_mask", "classify"]
    assert (inference.encoded[0].top_k, inference.encoded[1].pairs) == (2, ["Ho"])


def test_what_the_server_refuses_is_passed_on(client: TestClient, inference: FakeInference) -> None:
    inference.refuse(InvalidRequestError("It has no classes.", param="model", code="no_classes"))
    assert "no classes" in expect(post(client, "classify"), 400, "model", "no_classes")


def test_an_unknown_model_is_not_found(client: TestClient, inference: FakeInference) -> None:
    assert post(client, "embeddings", model="ft:base:x:y:z").status_code == 404
