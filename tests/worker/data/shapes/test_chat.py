"""OpenAI's chat format: every fault by its place and remedy, every odd thing as a warning."""

import json
from typing import Any

import pytest

from models.domain.rows import ChatRow
from worker.data import shapes
from worker.data.records import Fault

CHAT = shapes.SHAPES["openai_chat"]
COLUMNS = {"messages": "messages"}
USER = {"role": "user", "content": "How deep is it?"}
ANSWER = {"role": "assistant", "content": "Four metres."}
CALL = {"id": "c", "type": "function", "function": {"name": "depth", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "4"}


def parse(value: dict[str, Any]) -> ChatRow:
    row = CHAT.parse(value, COLUMNS)
    assert isinstance(row, ChatRow), row
    return row


def warnings(value: dict[str, Any]) -> list[tuple[str, str]]:
    found = CHAT.warnings(parse(value), value, COLUMNS)
    assert all(each.level == "warning" for each in found)
    return [(each.code, each.path) for each in found]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        [{"role": "developer", "content": "Be brief."}, USER, ANSWER],
        [{"role": "user", "content": [{"type": "text", "text": "Depth?"}]}, ANSWER],
        [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}],
        [USER, CALLING],
        [USER, CALLING, RESULT, ANSWER],
        [USER, {**ANSWER, "content": 'a "quoted" \\ word, \u2028 \u0085 and \\u0000'}],
        [{**ANSWER, "weight": 0}, USER, ANSWER],
    ],
)
def test_good_rows_are_taken_as_they_are(messages: list[dict[str, Any]]) -> None:
    row = parse({"messages": messages})
    plain = [message.model_dump(exclude_none=True) for message in row.messages]
    assert plain == [{k: v for k, v in each.items() if v is not None} for each in messages]


def test_other_spellings_become_ours() -> None:
    function = {"name": "depth", "arguments": "{}"}
    value = {
        "messages": [
            {**USER, "name": "Ada"},
            {"role": "assistant", "content": None, "function_call": function, "refusal": None},
            {"role": "function", "name": "depth", "content": "4"},
            {**ANSWER, "reasoning": "It says 4.", "audio": None},
        ],
        "functions": [{"name": "depth", "parameters": {}}],
    }
    row = parse(value)
    assert row.tools == [{"type": "function", "function": {"name": "depth", "parameters": {}}}]
    call = row.messages[1].tool_calls
    assert call == [{"id": "call_1", "type": "function", "function": function}]
    assert (row.messages[2].role, row.messages[2].tool_call_id) == ("tool", "call_1")
    assert row.messages[3].reasoning_content == "It says 4."
    assert warnings(value) == []


@pytest.mark.parametrize(
    ("row", "code", "path", "part"),
    [
        ({}, "missing_field", "messages", '"messages"'),
        ({"prompt": "a", "completion": "b"}, "missing_field", "messages", "prompt and completion"),
        ({"conversations": []}, "missing_field", "messages", "ShareGPT"),
        ({"mesages": [USER, ANSWER]}, "unknown_field", "mesages", "Did you mean 'messages'?"),
        ({"messages": [USER, {"role": "assistant", "contnet": "x"}]}, "unknown_field",
         "messages[1].contnet", "Did you mean 'content'?"),
        ({"messages": [USER, ANSWER], "weight": 2}, "unsupported_field", "weight", "weighted"),
        ({"messages": []}, "no_messages", "messages", "at least one"),
        ({"messages": "hello"}, "wrong_type", "messages", "expected an array, got a string"),
        ({"messages": [USER, "hello"]}, "wrong_type", "messages[1]", "expected an object"),
        ({"messages": [{"content": "x"}, ANSWER]}, "missing_field", "messages[0].role", "user"),
        ({"messages": [{"role": "human", "content": "x"}, ANSWER]}, "unknown_role",
         "messages[0].role", "Did you mean 'user'? Use one of system, developer, user"),
        ({"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, "unknown_role",
         "messages[0].role", "Use one of system"),
        ({"messages": [{"role": 3, "content": "x"}]}, "wrong_type", "messages[0].role", "a number"),
        ({"messages": [{**USER, "content": 3}, ANSWER]}, "wrong_type", "messages[0].content",
         "expected a string or an array of text parts, got a number"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": None}]}]}, "wrong_type",
         "messages[0].content[0].text", "got null"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "a", "x": 1}]}]},
         "unknown_field", "messages[0].content[0].x", "type, text"),
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}]},
         "unsupported_content", "messages[0].content[0].type", "Only text"),
        ({"messages": [USER, ANSWER], "tools": [3]}, "wrong_type", "tools[0]", "an object"),
        ({"messages": [USER, ANSWER], "tools": "x"}, "wrong_type", "tools", "an array"),
        ({"messages": [USER, ANSWER], "parallel_tool_calls": "yes"}, "wrong_type",
         "parallel_tool_calls", "true or false"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "invalid_value",
         "messages[1].weight", "0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "wrong_type",
         "messages[1].weight", "boolean"),
        ({"messages": [{**USER, "weight": 0}, ANSWER]}, "unexpected_field",
         "messages[0].weight", "only assistant"),
        ({"messages": [{"role": "user"}, ANSWER]}, "missing_content", "messages[0].content", "no"),
        ({"messages": [USER, {"role": "assistant"}]}, "empty_content", "messages[1].content", ""),
        ({"messages": [USER, {**ANSWER, "content": " \u200b\n"}]}, "empty_content",
         "messages[1].content", "empty"),
        ({"messages": [USER]}, "no_assistant_message", "messages", "never speaks"),
        ({"messages": [USER, ANSWER, USER]}, "last_message_not_assistant",
         "messages[2].role", "'user'"),
        ({"messages": [ANSWER, USER, ANSWER]}, "assistant_speaks_first", "messages[0].role", ""),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing_to_learn", "messages", "weight"),
        ({"messages": [USER, RESULT, ANSWER]}, "tool_without_call", "messages[1]", "tool_calls"),
        ({"messages": [USER, {**CALLING, "tool_calls": [{"function": {"arguments": "{}"}}]}]},
         "invalid_tool_call", "messages[1].tool_calls[0].function", "names no function"),
        ({"messages": [USER, {**CALLING, "tool_calls": [
            {"function": {"name": "x", "arguments": "{a: 1}"}}]}]}, "invalid_tool_arguments",
         "messages[1].tool_calls[0].function.arguments", "JSON object"),
        ({"messages": [USER, {**CALLING, "tool_calls": [
            {"function": {"name": "x", "arguments": "[]"}}]}]}, "invalid_tool_arguments",
         "messages[1].tool_calls[0].function.arguments", "JSON object"),
    ],
)  # fmt: skip
def test_faulty_rows_are_named_by_place_and_remedy(
    row: dict[str, Any], code: str, path: str, part: str
) -> None:
    fault = CHAT.parse(row, COLUMNS)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.path) == (code, path)
    assert part in f"{fault.message} {fault.hint}"


@pytest.mark.parametrize(
    ("row", "code", "path"),
    [
        ({"messages": [USER, USER, ANSWER]}, "repeated_role", "messages[1].role"),
        ({"messages": [USER, CALLING, USER, ANSWER]}, "tool_call_without_result",
         "messages[1].tool_calls"),
        ({"messages": [{**USER, "content": " "}, ANSWER]}, "empty_turn", "messages[0].content"),
        ({"messages": [USER, CALLING], "tools": [{"function": {"name": "tide"}}]}, "unknown_tool",
         "messages[1].tool_calls[0].function.name"),
        ({"messages": [USER, ANSWER], "id": 3}, "ignored_field", "id"),
        ({"messages": [{**USER, "ts": 3}, ANSWER]}, "ignored_field", "messages[0].ts"),
        ({"messages": [USER, {**ANSWER, "content": "a <|im_end|> b"}]}, "special_token_in_text",
         "messages[1].content"),
        ({"messages": [{**USER, "content": "[INST] a"}, ANSWER]}, "special_token_in_text",
         "messages[0].content"),
    ],
)  # fmt: skip
def test_odd_rows_are_taken_with_a_warning(row: dict[str, Any], code: str, path: str) -> None:
    assert warnings(row) == [(code, path)]


def test_places_are_told_in_the_words_of_the_file() -> None:
    fault = CHAT.parse({"dialogue": [{**USER, "role": "x"}]}, {"messages": "dialogue"})
    assert isinstance(fault, Fault)
    assert fault.path == "dialogue[0].role"


def test_what_a_person_wrote_is_never_echoed_at_length() -> None:
    long = "k" * 100_000
    for row in ({long: 1}, {"messages": [{"role": long}]}, {"messages": [{long: {long: 1}}]}):
        fault = CHAT.parse(row, COLUMNS)
        assert isinstance(fault, Fault)
        assert len(json.dumps([fault.message, fault.path, fault.hint])) < 600
