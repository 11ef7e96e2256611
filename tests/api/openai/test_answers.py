"""What chat answers carry beside text: tool calls, log-probabilities, formats, cached tokens."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.domain.generation import (
    Chunk,
    Finished,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from tests.api.calls import chat
from tests.api.fake_inference import FINISHED, STARTED, FakeInference
from tests.api.openai.test_chat import sse

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "tide", "parameters": {"type": "object"}},
}
CALLS = [
    STARTED,
    Chunk(text="Let me look."),
    Chunk(text="", tool_calls=(ToolCallDelta(index=0, id="call_a", name="tide"),)),
    Chunk(text="", tool_calls=(ToolCallDelta(index=0, arguments='{"a"'),)),
    Chunk(
        text="",
        tool_calls=(
            ToolCallDelta(index=0, arguments=": 1}"),
            ToolCallDelta(index=1, id="call_b", name="wind", arguments="{}"),
        ),
    ),
    Chunk(text="", finish_reason="tool_calls"),
    FINISHED,
]


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def test_tool_calls_are_put_together(client: TestClient, inference: FakeInference) -> None:
    inference.events = list(CALLS)
    [choice] = chat(client, tools=[TOOL]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Let me look.",
        "refusal": None,
        "tool_calls": [call("call_a", "tide", '{"a": 1}'), call("call_b", "wind", "{}")],
    }
    assert inference.requests[0].tools == [TOOL]


def test_a_call_without_text_has_null_content_and_can_be_sent_back(
    client: TestClient, inference: FakeInference
) -> None:
    inference.events = [CALLS[0], *CALLS[2:]]
    [choice] = chat(client, tools=[TOOL]).json()["choices"]
    assert choice["message"]["content"] is None
    result = {"role": "tool", "tool_call_id": "call_a", "content": "4 m"}
    user = {"role": "user", "content": "Hi"}
    answer = chat(client, messages=[user, choice["message"], result], tools=[TOOL])
    assert answer.status_code == 200, answer.text


def test_streamed_calls_begin_with_id_and_name(
    client: TestClient, inference: FakeInference
) -> None:
    inference.events = list(CALLS)
    chunks = sse(chat(client, tools=[TOOL], stream=True))[:-1]
    deltas = [
        delta for chunk in chunks for delta in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert deltas == [
        {"index": 0, **call("call_a", "tide", "")},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 1, **call("call_b", "wind", "{}")},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


SCORED = TokenLogprob(
    text="Hé",
    bytes=(72, 195, 169),
    logprob=-0.25,
    top=(TopLogprob(text="Hé", bytes=(72, 195, 169), logprob=-0.25),),
)
SCORED_BODY = {
    "token": "Hé",
    "bytes": [72, 195, 169],
    "logprob": -0.25,
    "top_logprobs": [{"token": "Hé", "bytes": [72, 195, 169], "logprob": -0.25}],
}


def test_log_probabilities_are_there_only_where_they_were_asked_for(
    client: TestClient, inference: FakeInference
) -> None:
    inference.events = [
        STARTED,
        Chunk(text="Hé", logprobs=(SCORED,)),
        Chunk(text="", finish_reason="stop"),
        FINISHED,
    ]
    asked = {"logprobs": True, "top_logprobs": 1}
    [choice] = chat(client, **asked).json()["choices"]
    assert choice["logprobs"] == {"content": [SCORED_BODY], "refusal": None}
    assert inference.requests[0].sampling.logprobs == 1
    chunks = sse(chat(client, **asked, stream=True))[:-1]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert streamed == [None, {"content": [SCORED_BODY], "refusal": None}, None]
    [plain] = chat(client).json()["choices"]
    assert plain["logprobs"] is None


def test_cached_tokens_are_told(client: TestClient, inference: FakeInference) -> None:
    done = Finished(prompt_tokens=7, completion_tokens=2, cached_tokens=5)
    inference.events = [STARTED, Chunk(text="a", finish_reason="stop"), done]
    usage = chat(client).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"logit_bias": {"5": 200}}, "logit_bias.5"),
    ],
)
def test_a_bad_field_is_named(
    client: TestClient, inference: FakeInference, fields: dict[str, Any], param: str
) -> None:
    response = chat(client, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert inference.requests == []


def test_a_choice_of_tool_without_tools_is_refused(
    client: TestClient, inference: FakeInference
) -> None:
    assert "needs 'tools'" in chat(client, tool_choice="required").json()["error"]["message"]
