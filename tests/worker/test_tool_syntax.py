"""How templates of several families write tool calls, found by having them write some."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from models.domain.rows import ChatMessage
from tests.worker.chats import WITH_TOOLS, with_template
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.tool_syntax import HERMES, ToolSyntax, as_call, text_of

QWEN = """\
{% if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}{% if m.content %}
{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>{% endif %}\
{% for m in messages %}{% if m.tool_calls %}\
{% if m.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}\
<|im_start|>assistant

{"name": "{{ m.tool_calls[0].function.name }}", "parameters": \
{{ m.tool_calls[0].function.arguments | tojson }}}<|im_end|>\
{% else %}<|im_start|>{{ m.role }}

{{ m.content }}<|im_end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant

{% endif %}"""

MISTRAL = """\
{% for m in messages %}{% if m.role == 'user' %}{% if tools %}{{ tools | tojson }}{% endif %}\
[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}\
<|im_start|>[{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": \
{{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}\
{% endfor %}]{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""

XML = """\
{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>\
{% for k, v in c.function.arguments.items() %}<p={{ k }}>{{ v }}</p>{% endfor %}</function>\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(smollm2: tuple[Path, BaseModelInfo]) -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2[0])


def syntax(tokenizer: PreTrainedTokenizerBase, template: str) -> ToolSyntax:
    return ChatRenderer(with_template(tokenizer, template)).tool_syntax


def test_qwen_puts_marks_around_each_call(tokenizer: PreTrainedTokenizerBase) -> None:
    found = syntax(tokenizer, QWEN)
    assert (found.marker, found.end_marker) == ("<tool_call>", "</tool_call>")
    assert (found.before_name, found.between, found.after) == (
        '{"name": "',
        '", "arguments": ',
        "}",
    )
    assert (found.separator, found.is_list) == ("\n", False)


def test_llama_3_writes_one_bare_object_with_parameters(tokenizer: PreTrainedTokenizerBase) -> None:
    found = syntax(tokenizer, LLAMA3)
    assert (found.marker, found.end_marker, found.opening) == ("", "", ())
    assert (found.between, found.separator) == ('", "parameters": ', None)


def test_mistral_writes_a_list_after_a_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    found = syntax(tokenizer, MISTRAL)
    assert (found.marker, found.end_marker, found.is_list) == ("", "", True)
    assert found.opening == (tokenizer.convert_tokens_to_ids("<|im_start|>"), "[")
    assert (found.separator, text_of(found.closing)) == (", ", "]")


@pytest.mark.parametrize("template", [XML, None])
def test_a_template_whose_calls_are_no_json_gets_the_commonest_style(
    tokenizer: PreTrainedTokenizerBase, template: str | None
) -> None:
    renderer = ChatRenderer(with_template(tokenizer, template) if template else tokenizer)
    assert renderer.tool_syntax == HERMES


@pytest.mark.parametrize("template", [QWEN, LLAMA3, MISTRAL, WITH_TOOLS])
def test_the_parts_put_together_are_what_the_template_writes(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    renderer = ChatRenderer(with_template(tokenizer, template))
    found = renderer.tool_syntax
    call = {"id": "call00000", "function": {"name": "tide", "arguments": '{"port": "Kiel"}'}}
    turns = [
        ChatMessage(role="user", content="Hi"),
        ChatMessage(role="assistant", content="", tool_calls=[call]),
        ChatMessage(role="user", content="Hi"),
    ]
    whole = tokenizer.decode(renderer.prompt_ids(turns), skip_special_tokens=True)
    written = found.before_name + "tide" + found.between + json.dumps({"port": "Kiel"})
    assert text_of(found.opening) + written in whole


@pytest.mark.parametrize(
    "value",
    [
        {"name": "f", "arguments": {"a": 1}},
        {"name": "f", "parameters": {"a": 1}},
        {"name": "f", "arguments": '{"a": 1}'},
        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"type": "function", "function": "f", "parameters": {"a": 1}},
    ],
)
def test_a_call_is_known_in_any_style(value: object) -> None:
    assert as_call(value) == ("f", '{"a": 1}')


@pytest.mark.parametrize("value", [None, [], "f", {"name": "f"}, {"arguments": {}}, {"name": 1}])
def test_other_json_is_no_call(value: object) -> None:
    assert as_call(value) is None
