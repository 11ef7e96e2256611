"""Completions are kept when that is asked for, whole ones only, streamed ones too."""

from fastapi.testclient import TestClient

from tests.api.calls import chat, expect
from tests.api.fake_inference import HELLO, Cut, FakeInference

PATH = "/v1/chat/completions"


def test_a_streamed_completion_is_kept_like_a_plain_one(
    client: TestClient, inference: FakeInference
) -> None:
    plain = chat(client, store=True).json()
    assert chat(client, store=True, stream=True).text.endswith("data: [DONE]\n\n")
    first, second = client.get(PATH).json()["data"]
    assert first == plain | {"metadata": None}
    assert second["choices"] == plain["choices"]
    assert second["usage"] == plain["usage"]
    assert second["object"] == "chat.completion"


def test_what_was_not_asked_for_or_broke_off_is_not_kept(
    client: TestClient, inference: FakeInference
) -> None:
    chat(client, metadata={"a": "b"})
    inference.events = [*HELLO[:2], Cut()]
    chat(client, store=True)
    chat(client, store=True, stream=True)
    assert client.get(PATH).json()["data"] == []


def test_what_is_refused_names_its_field(client: TestClient, inference: FakeInference) -> None:
    expect(chat(client, store="yes"), 400, "store", "invalid_value")
    made = chat(client, store=True).json()["id"]
    path = f"{PATH}/{made}"
    expect(client.post(path, json={}), 400, "metadata", "missing_required_parameter")
    answer = client.get(f"{path}/messages", params={"after": "x"})
    expect(answer, 400, "after", "invalid_value")
    expect(client.get(f"{PATH}/chatcmpl-x"), 404, "completion_id", "completion_not_found")
