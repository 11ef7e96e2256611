"""Chat templates: the text of transformers, within limits, and the marks of what a model writes."""

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from worker.chat_template import DEFAULT_TEMPLATE, MAX_SOURCE, ChatTemplate
from worker.template_sandbox import MAX_TEXT, TemplateLimitError

FAMILIES = Path(__file__).parents[1] / "chat_templates"
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "How deep?"},
    {"role": "assistant", "content": "Four metres. 水深"},
    {"role": "user", "content": "And <b>now</b>?"},
]
TOOLS = [{"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("family", sorted(path.stem for path in FAMILIES.glob("*.jinja")))
@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_text_is_that_of_transformers(
    family: str, opens: bool, tools: list[dict[str, Any]] | None
) -> None:
    source = (FAMILIES / f"{family}.jinja").read_text()
    options: dict[str, Any] = {**NAMES, "tools": tools, "add_generation_prompt": opens}
    expected = render_jinja_template([TALK], chat_template=source, **options)[0][0]
    shown = ChatTemplate(source, NAMES).render(TALK, tools, add_generation_prompt=opens)
    assert shown == expected


def test_reasoning_is_found_under_both_of_its_names() -> None:
    template = ChatTemplate("{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", {})
    assert template.render([{"role": "assistant", "reasoning_content": "hm "}]) == "hm hm "


def test_the_default_template_writes_plain_words_and_the_models_own_tokens() -> None:
    shown = ChatTemplate(DEFAULT_TEMPLATE, NAMES).render(
        [{"role": "system", "content": "Be brief."}, *TALK], add_generation_prompt=True
    )
    assert shown == (
        "<s>Be brief.\n\n### User:\nHow deep?\n\n### Assistant:\nFour metres. 水深</s>\n\n"
        "### User:\nAnd <b>now</b>?\n\n### Assistant:\n"
    )


def test_a_model_without_a_start_token_gets_none_in_the_default_template() -> None:
    shown = ChatTemplate(DEFAULT_TEMPLATE, {"eos_token": "<e>"}).render(TALK[:2])
    assert shown == "### User:\nHow deep?\n\n### Assistant:\nFour metres. 水深<e>\n\n"


def test_the_default_template_refuses_tools() -> None:
    with pytest.raises(TemplateError, match="no tools"):
        ChatTemplate(DEFAULT_TEMPLATE, NAMES).render([{"role": "tool", "content": "4"}])


def test_marked_generations_are_found_without_changing_the_text() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}.{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    template = ChatTemplate(source, {})
    talk = [*TALK, {"role": "assistant", "content": " Five "}]
    text, spans = template.generations(talk)
    assert template.marks_answers
    assert text == template.render(talk)
    assert [text[start:end] for start, end in spans] == ["Four metres. 水深.", "Five."]


def test_a_template_without_marks_has_no_generations() -> None:
    template = ChatTemplate(DEFAULT_TEMPLATE, NAMES)
    assert not template.marks_answers
    assert template.generations(TALK) == (template.render(TALK), [])


def test_a_source_that_is_too_long_is_refused() -> None:
    with pytest.raises(TemplateLimitError, match="source"):
        ChatTemplate("x" * (MAX_SOURCE + 1), {})


def test_an_output_that_is_too_long_is_refused() -> None:
    template = ChatTemplate("{% for i in range(9) %}{{ messages[0].content }}{% endfor %}", {})
    with pytest.raises(TemplateLimitError, match=f"{MAX_TEXT:,}"):
        template.render([{"role": "user", "content": "x" * (MAX_TEXT // 8)}])
