"""The sandbox of chat templates: no template can use up the process that runs it."""

import pytest
from jinja2.exceptions import SecurityError, TemplateError

from worker import template_sandbox
from worker.template_sandbox import MAX_TEXT, TemplateLimitError, TemplateSandbox


def render(source: str, **variables: object) -> str:
    with template_sandbox.running():
        return TemplateSandbox().from_string(source).render(**variables)


BOMBS = {
    "a string times a number": "{{ 'ab' * 1000000000 }}",
    "a number times a string": "{{ 1000000000 * 'ab' }}",
    "a list times a number": "{{ [1, 2] * 1000000000 }}",
    "doubling by ~": "{% set n = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by +": "{% set n = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling a list": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set n.s = n.s.replace('a', 'aa') %}{% endfor %}",
    "doubling by the filter replace": "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set n.s = n.s | replace('a', 'aa') %}{% endfor %}",
    "doubling by join": "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "doubling by the method join": "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set n.s = ','.join([n.s, n.s]) %}{% endfor %}",
    "joining the characters of a text": "{{ ('x' * 4000) | join('y' * 4000) }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "squaring": "{% set n = namespace(s=99) %}{% for i in range(60) %}"
    "{% set n.s = n.s * n.s %}{% endfor %}",
    "a wide filter center": "{{ 'a' | center(1000000000) }}",
    "a wide method center": "{{ 'a'.center(1000000000) }}",
    "a wide zfill": "{{ 'a'.zfill(1000000000) }}",
    "a wide ljust by name": "{{ 'a'.ljust(width=1000000000) }}",
    "a wide tab": "{{ ('\t' * 1000).expandtabs(100000) }}",
    "a wide indent": "{{ ('\n' * 1000) | indent(100000) }}",
    "a wide percent format": "{{ '%1000000000d' % 1 }}",
    "a percent format of free width": "{{ '%*d' % (1000000000, 1) }}",
    "a wide brace format": "{{ '{:1000000000d}'.format(1) }}",
    "a brace format of free width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a wide filter format": "{{ '%1000000000d' | format(1) }}",
    "a wide strftime": "{{ strftime_now('%1000000000d') }}",
    "wide JSON": "{{ [1] | tojson(indent=1000000000) }}",
    "many batches": "{{ [1] | batch(1000000000, 0) | list }}",
    "filters behind map": "{{ ['a'] | map('center', 1000000000) | list }}",
    "nested loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "loops over texts": "{% set s = 'x' * 9999 %}{% for i in s %}{% for j in s %}{% endfor %}"
    "{% endfor %}",
    "a range": "{{ range(1000000000) | list }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_stopped_before_it_goes_off(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 20_000)
    with pytest.raises((TemplateLimitError, OverflowError)):
        render(source)


def test_a_macro_without_end_is_stopped() -> None:
    with pytest.raises(RecursionError):
        render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


def test_a_template_that_runs_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.0)
    with pytest.raises(TemplateLimitError, match="seconds"):
        render("{% for i in range(1000) %}{% endfor %}")


def test_each_rendering_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 10_000)
    template = TemplateSandbox().from_string("{% for i in range(9000) %}{% endfor %}done")
    for _ in range(3):
        with template_sandbox.running():
            assert template.render() == "done"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(**{'__init__': 1}) }}",
    ],
)
def test_python_itself_is_out_of_reach(source: str) -> None:
    with pytest.raises((SecurityError, TemplateError)):
        render(source, messages=[])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' * 3 }}{{ 2 * 3 }}{{ 2 ** 5 }}{{ 7 % 4 }}", "aaa6323"),
        ("{{ '%s-%03d' % ('a', 7) }}{{ '{:>4}'.format('b') }}", "a-007   b"),
        ("{{ 'a' ~ 1 ~ none }}{{ [1] + [2] }}", "a1None[1, 2]"),
        ("{{ ['a', 'b'] | join(', ') }}{{ '-'.join(['c', 'd']) }}", "a, bc-d"),
        ("{{ 'aXb'.replace('X', '_') }}{{ 'aXb' | replace('X', '') }}", "a_bab"),
        ("{{ ['é', {'a': 1}] | tojson }}", '["é", {"a": 1}]'),
        (
            "{{ {'b': 1, 'a': '<'} | tojson(indent=1, sort_keys=true) }}",
            '{\n "a": "<",\n "b": 1\n}',
        ),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) }}{{ m(2) }}", "[1][2]"),
        ("{{ 'a\nb' | indent(2) }}{{ 'ab' | center(6) }}", "a\n  b  ab  "),
        ("{% set n = namespace(k=1) %}{% set n.k = n.k + 1 %}{{ n.k }}", "2"),
        ("{{ 12345678 | string }}{{ [12345678] | tojson }}", "12345678[12345678]"),
        ("{% generation %}said{% endgeneration %}", "said"),
    ],
)
def test_what_templates_really_use_works(source: str, text: str) -> None:
    assert render(source) == text


def test_the_largest_text_that_is_allowed_passes() -> None:
    assert len(render("{{ 'a' * n }}", n=MAX_TEXT)) == MAX_TEXT
