"""Rows of every form come back from Arrow as they were."""

from typing import Any

import pyarrow as pa
import pytest

from models.domain.rows import ROW_TYPES, Row
from worker.data import forms

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": ""},
    {"role": "user", "content": [{"type": "text", "text": "水深"}, {"type": "text", "text": ""}]},
    {"role": "user", "content": "x", "name": "Ada"},
    {
        "role": "assistant",
        "content": None,
        "weight": 0,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "c", "function": {"name": "f", "arguments": '{"a": [1, 2.5, null]}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "كم"},
    {"role": "assistant", "content": "🚤", "weight": 1},
]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"messages": MESSAGES, "tools": [{"function": {"name": "f", "x": [{}]}}]},
        {"messages": MESSAGES[2:3], "parallel_tool_calls": False},
        {"messages": MESSAGES[::-1], "tools": []},
    ],
    "completion": [{"prompt": "", "completion": " a"}],
    "text": [{"text": "a\u2028b"}, {"text": "c"}],
    "preference": [
        {"messages": MESSAGES[:2], "preferred": MESSAGES[-1], "rejected": MESSAGES[3]},
        {"messages": [], "preferred": MESSAGES[-1], "rejected": MESSAGES[3], "tools": [{"a": 1}]},
    ],
    "labelled": [
        {"text": "a", "labels": ["x", "y"]},
        {"text": "a", "text_pair": "b", "labels": ["x"]},
    ],
    "pair": [{"first": "a", "second": "b"}, {"first": "a", "second": "b", "score": 0.25}],
    "choice": [{"question": "q", "choices": ["a", "b"], "answer": 1}],
    "seq2seq": [{"source": "a", "target": "b"}],
}


def test_every_form_has_examples() -> None:
    assert set(EXAMPLES) == set(ROW_TYPES)


@pytest.mark.parametrize("form", list(ROW_TYPES))
def test_rows_come_back_as_they_were(form: str) -> None:
    rows: list[Row] = [ROW_TYPES[form].model_validate(each) for each in EXAMPLES[form]]
    lines = list(range(3, 3 + len(rows)))
    batch = forms.to_batch(form, rows, lines)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pa.ipc.open_stream(sink.getvalue()) as reader:
        (read,) = list(reader)
    assert forms.from_batch(form, read) == list(zip(lines, rows, strict=True))


@pytest.mark.parametrize("form", list(ROW_TYPES))
def test_the_schema_does_not_depend_on_the_rows(form: str) -> None:
    rows: list[Row] = [ROW_TYPES[form].model_validate(each) for each in EXAMPLES[form]]
    schemas = [forms.to_batch(form, chosen, range(len(chosen))).schema for chosen in ([], rows)]
    assert schemas[0] == schemas[1]
