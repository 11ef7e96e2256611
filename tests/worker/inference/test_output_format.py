"""Grammars of requests: schemas, calls in the template's own style, and clear refusals."""

import json
from dataclasses import replace
from typing import Any

import pytest

from models.domain.generation import GenerateRequest, SamplingParams
from models.errors import InvalidRequestError
from tests.worker.inference.conftest import Tokenizers
from worker.inference.engine.grammar import Grammar, Vocabulary
from worker.inference.output_format import MAX_SCHEMA_CHARACTERS, grammar_of
from worker.tool_syntax import HERMES, ToolSyntax

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/n"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer"}},
}
TIDE = {"type": "function", "function": {"name": "tide", "parameters": SCHEMA}}
WIND = {"type": "function", "function": {"name": "wind"}}
LIST = ToolSyntax(
    opening=(1, "["),
    before_name='{"name": "',
    between='", "arguments": ',
    after="}",
    closing=("]",),
    separator=", ",
    is_list=True,
)


@pytest.fixture(scope="module")
def vocabulary(tokenizers: Tokenizers) -> Vocabulary:
    return Vocabulary(tokenizers[0], tokenizers[1].stop_ids)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        base_model="tiny",
        adapter=None,
        prompt="x",
        sampling=SamplingParams(),
        **fields,
    )


def takes(grammar: Grammar, tokenizers: Tokenizers, text: str) -> bool:
    """Whether the grammar allows `text`, special tokens in it included, as a whole answer."""
    constraint = grammar()
    for token in tokenizers[0].encode(text, add_special_tokens=False):
        if not constraint.allowed()[token]:
            return False
        constraint.advance(token)
    return constraint.is_over or bool(constraint.allowed()[sorted(tokenizers[1].stop_ids)].all())


def grammar(vocabulary: Vocabulary, syntax: ToolSyntax = HERMES, **fields: Any) -> Grammar:
    made = grammar_of(request(**fields), lambda: syntax, vocabulary)
    assert made is not None
    return made


def test_without_schema_and_forced_call_anything_goes(vocabulary: Vocabulary) -> None:
    assert grammar_of(request(), lambda: HERMES, vocabulary) is None
    assert grammar_of(request(tools=[TIDE]), lambda: HERMES, vocabulary) is None


def test_a_schema_is_followed_with_any_but_endless_white_space(
    vocabulary: Vocabulary, tokenizers: Tokenizers
) -> None:
    made = grammar(vocabulary, json_schema=SCHEMA)
    assert takes(made, tokenizers, '{"a": 5}')
    assert takes(made, tokenizers, '{\n  "a": 5\n}')
    assert not takes(made, tokenizers, '{"a": "5"}')
    assert not takes(made, tokenizers, '{"a": 5')
    assert not takes(made, tokenizers, "{" + "\n" * 300 + '"a": 5}')


def call(name: str, arguments: object) -> str:
    return f'{{"name": "{name}", "arguments": {json.dumps(arguments)}}}'


def test_a_required_call_is_in_the_style_of_the_template(
    vocabulary: Vocabulary, tokenizers: Tokenizers
) -> None:
    made = grammar(vocabulary, tools=[TIDE, WIND], tool_choice="required")
    one = f"<tool_call>\n{call('tide', {'a': 5})}\n</tool_call>"
    assert takes(made, tokenizers, one)
    assert takes(made, tokenizers, f"<tool_call>\n{call('wind', {'x': 1})}\n</tool_call>\n{one}")
    assert not takes(made, tokenizers, f"<tool_call>\n{call('tide', {'a': 'x'})}\n</tool_call>")
    assert not takes(made, tokenizers, f"<tool_call>\n{call('rain', {})}\n</tool_call>")
    assert not takes(made, tokenizers, "Hello")


def test_one_call_only_where_several_are_not_wanted_or_not_known(
    vocabulary: Vocabulary, tokenizers: Tokenizers
) -> None:
    one = f"<tool_call>\n{call('wind', {})}\n</tool_call>"
    for syntax, parallel in ((HERMES, False), (replace(HERMES, separator=None), True)):
        made = grammar(
            vocabulary, syntax, tools=[WIND], tool_choice="required", parallel_tool_calls=parallel
        )
        assert takes(made, tokenizers, one)
        assert not takes(made, tokenizers, f"{one}\n{one}")


def test_a_named_tool_is_the_only_one(vocabulary: Vocabulary, tokenizers: Tokenizers) -> None:
    made = grammar(vocabulary, LIST, tools=[TIDE, WIND], tool_choice={"name": "wind"})
    assert takes(made, tokenizers, f"<|im_start|>[{call('wind', {})}, {call('wind', {})}]")
    assert not takes(made, tokenizers, f"<|im_start|>[{call('tide', {'a': 5})}]")
    assert not takes(made, tokenizers, f"[{call('wind', {})}]")


def test_a_schema_with_tools_that_need_not_be_called_is_either(
    vocabulary: Vocabulary, tokenizers: Tokenizers
) -> None:
    made = grammar(vocabulary, tools=[WIND], json_schema=SCHEMA)
    assert takes(made, tokenizers, '{"a": 5}')
    assert takes(made, tokenizers, f"<tool_call>\n{call('wind', {})}\n</tool_call>")
    assert not takes(made, tokenizers, "Hello")


BAD = {"type": "array", "uniqueItems": True}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"json_schema": BAD}, "response_format"),
        ({"json_schema": {"enum": ["x" * MAX_SCHEMA_CHARACTERS]}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WIND], "tool_choice": {"name": "tide"}}, "tool_choice"),
        (
            {
                "tools": [WIND, {"type": "function", "function": {"name": "f", "parameters": BAD}}],
                "tool_choice": "required",
            },
            "tools[1].function.parameters",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0]"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_named(
    vocabulary: Vocabulary, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        grammar_of(request(**fields), lambda: HERMES, vocabulary)
    assert caught.value.param == param
