"""Tool calls out of text that comes in pieces of any size."""

import json
import random
from dataclasses import replace

import pytest

from models.domain.generation import ToolCallDelta
from worker.inference.tool_stream import ToolStream
from worker.tool_syntax import HERMES, ToolSyntax

BARE = ToolSyntax(
    opening=(),
    before_name='{"name": "',
    between='", "parameters": ',
    after="}",
    closing=(),
    separator=None,
    is_list=False,
)
LIST = replace(BARE, opening=(5, "["), closing=("]",), separator=", ", is_list=True)
NAMES = frozenset({"tide", "wind"})
Calls = list[tuple[str, str]]


def read(
    text: str, syntax: ToolSyntax = HERMES, *, size: int = 1, parallel: bool = True
) -> tuple[str, Calls]:
    """Content and calls of `text` in pieces of `size` characters."""
    stream = ToolStream(syntax, NAMES, parallel=parallel)
    content, deltas = "", list[ToolCallDelta]()
    for start in range(0, len(text), size):
        more, calls = stream.push(text[start : start + size])
        content, deltas = content + more, [*deltas, *calls]
    more, calls = stream.finish()
    content, deltas = content + more, [*deltas, *calls]
    found: list[list[str]] = []
    for delta in deltas:
        if delta.index == len(found):
            assert delta.id is not None
            assert delta.name is not None
            assert delta.id.startswith("call_")
            found.append([delta.name, ""])
        else:
            assert (delta.index, delta.id, delta.name) == (len(found) - 1, None, None)
        found[-1][1] += delta.arguments
    assert stream.n_calls == len(found)
    return content, [(name, arguments) for name, arguments in found]


TIDE = '{"name": "tide", "arguments": {"port": "Ki}el \\"x\\"", "at": [1, {"a": 2}]}}'
ARGUMENTS = '{"port": "Ki}el \\"x\\"", "at": [1, {"a": 2}]}'
WIND = '{"name": "wind", "parameters": {}}'

CASES: dict[str, tuple[ToolSyntax, str, str, Calls]] = {
    "no call": (HERMES, "Just  text.\n", "Just  text.\n", []),
    "one": (HERMES, f"<tool_call>\n{TIDE}\n</tool_call>", "", [("tide", ARGUMENTS)]),
    "text before": (
        HERMES,
        f"Let me look. \n\n<tool_call>{TIDE}</tool_call>\n",
        "Let me look.",
        [("tide", ARGUMENTS)],
    ),
    "two": (
        HERMES,
        f"<tool_call>\n{TIDE}\n</tool_call>\n<tool_call>\n{WIND}\n</tool_call>",
        "",
        [("tide", ARGUMENTS), ("wind", "{}")],
    ),
    "no end mark": (
        HERMES,
        f"<tool_call>\n{TIDE}\n<tool_call>{WIND}",
        "",
        [("tide", ARGUMENTS), ("wind", "{}")],
    ),
    "arguments first": (
        HERMES,
        '<tool_call>{"arguments": {"a": 1}, "name": "tide"}</tool_call>',
        "",
        [("tide", '{"a": 1}')],
    ),
    "quoted arguments": (
        HERMES,
        '<tool_call>{"name": "tide", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("tide", '{"a": 1}')],
    ),
    "text after": (HERMES, f"<tool_call>{WIND}</tool_call> Done.", " Done.", [("wind", "{}")]),
    "a mark that is only text": (HERMES, "The <tool_call> tag.", "The <tool_call> tag.", []),
    "broken": (
        HERMES,
        "a <tool_call>{oops</tool_call> b",
        "a <tool_call>{oops</tool_call> b",
        [],
    ),
    "no call inside": (
        HERMES,
        '<tool_call>{"x": 1}</tool_call>',
        '<tool_call>{"x": 1}</tool_call>',
        [],
    ),
    "empty": (HERMES, "<tool_call></tool_call>!", "<tool_call></tool_call>!", []),
    "beginning of a mark": (HERMES, "a <tool_", "a <tool_", []),
    "cut in the arguments": (
        HERMES,
        '<tool_call>{"name": "tide", "arguments": {"po',
        "",
        [("tide", '{"po')],
    ),
    "cut in the name": (
        HERMES,
        '<tool_call>{"name": "ti',
        '<tool_call>{"name": "ti',
        [],
    ),
    "bare": (BARE, f"\n {WIND}", "", [("wind", "{}")]),
    "bare, two": (BARE, f"{WIND}; {TIDE}", "", [("wind", "{}"), ("tide", ARGUMENTS)]),
    "bare, unknown tool": (
        BARE,
        '{"name": "me", "parameters": {"a": 1}} x',
        '{"name": "me", "parameters": {"a": 1}} x',
        [],
    ),
    "bare json": (BARE, '{"answer": [1, 2]}\n', '{"answer": [1, 2]}\n', []),
    "bare later is text": (BARE, f"Use {WIND}", f"Use {WIND}", []),
    "bare, function around": (
        BARE,
        '{"type": "function", "function": {"name": "wind", "arguments": {}}}',
        "",
        [("wind", "{}")],
    ),
    "bare text": (BARE, "Plain.  ", "Plain.  ", []),
    "list": (LIST, f"[{WIND}, {TIDE}]", "", [("wind", "{}"), ("tide", ARGUMENTS)]),
    "list of something else": (LIST, "[1, 2, 3]", "[1, 2, 3]", []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_content_and_calls_do_not_depend_on_the_pieces(case: str, size: int) -> None:
    syntax, text, content, calls = CASES[case]
    assert read(text, syntax, size=size) == (content, calls)


def test_arguments_leave_as_they_come() -> None:
    stream = ToolStream(HERMES, NAMES)
    text = f"<tool_call>\n{TIDE}"
    seen = [stream.push(char)[1] for char in text]
    first = next(index for index, deltas in enumerate(seen) if deltas)
    assert text[: first + 1].endswith('"arguments": {')
    assert sum(map(len, seen)) > len(ARGUMENTS) - 2


def test_one_call_is_the_last_where_several_are_not_wanted() -> None:
    text = f"<tool_call>{WIND}</tool_call><tool_call>{TIDE}</tool_call> more"
    assert read(text, parallel=False) == ("", [("wind", "{}")])


def test_random_texts_are_never_lost_and_never_leak_a_mark() -> None:
    draw = random.Random(5)
    parts = ["<tool_call>", "</tool_call>", TIDE, WIND, "{", "}", "[", "text ", "\n", '"']
    for _ in range(400):
        text = "".join(draw.choices(parts, k=draw.randint(1, 7)))
        whole = read(text, size=1000)
        for size in (1, 5):
            assert read(text, size=size) == whole
        content, calls = whole
        for _, arguments in calls:
            assert json.loads(arguments) in ({}, json.loads(ARGUMENTS))
        if not calls:
            assert content == text
