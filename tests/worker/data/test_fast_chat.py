"""The fast lane takes nothing that the slow way would refuse, warn of, or read differently."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.domain.rows import ChatRow
from worker.data import fast_chat, forms, json_values, normalised, shapes

CHAT = shapes.SHAPES["openai_chat"]
COLUMNS = {"messages": "messages"}
GOOD = '{"messages":[{"role":"user","content":"a \\"b\\" é"},{"role":"assistant","content":"c"}]}'

roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "human"])
contents = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "\u200b", 'a"b', "<|im_end|>", "</s>", "[INST]", "a\\u0022", "\x00"]),
)
messages = st.fixed_dictionaries(
    {"role": roles, "content": contents},
    optional={"weight": st.sampled_from([0, 1, None, True, 0.0, 2]), "name": st.just("x")},
)
rows = st.fixed_dictionaries(
    {"messages": st.lists(messages, max_size=5)}, optional={"tools": st.just([]), "id": st.just(1)}
)


def check(raw: bytes) -> bool:
    """Hold the rule for one text; return whether the fast lane took it."""
    fast = fast_chat.accept(raw)
    if fast is None:
        return False
    value = json_values.load(raw)
    assert isinstance(value, dict), value
    slow = CHAT.parse(value, COLUMNS)
    assert isinstance(slow, ChatRow), slow
    assert CHAT.warnings(slow, value, COLUMNS) == []
    assert normalised.canonical(fast) == normalised.canonical(slow)
    batches = [forms.to_batch("chat", [row], [1]) for row in (fast, slow)]
    assert batches[0].equals(batches[1])
    assert forms.from_batch("chat", batches[0]) == [(1, slow)]
    return True


@settings(max_examples=300, deadline=None)
@given(rows, st.booleans())
def test_what_it_takes_the_slow_way_takes_too(row: dict[str, Any], ascii_only: bool) -> None:
    raw = json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    check(raw)


def test_damaged_text_is_never_taken_as_something_else() -> None:
    draw = random.Random(23)
    scraps = [
        '"',
        "\\u0022",
        "\\u0000",
        "\\ud800",
        ',"role":"user"',
        '"a":1,',
        "NaN",
        "{",
        "]",
        " ",
    ]
    n_taken = 0
    for _ in range(5_000):
        text = GOOD
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(scraps) + text[at + draw.randint(0, 4) :]
        n_taken += check(text.encode())
    assert n_taken > 20


def test_everyday_rows_are_taken() -> None:
    assert check(GOOD.encode())
    assert check(json.dumps(json.loads(GOOD), indent=1).encode())
    assert check(GOOD.replace('"c"}', '"c","weight":1}').encode())


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace('"content":"c"', '"content":"c","content":"c"'),
        GOOD.replace('"role":"user"', '"role":"user","role":"user"'),
        GOOD.replace('\\"b\\"', '\\u0022b","role":"user'),
        GOOD.replace('"c"', '"<|im_end|>"'),
        GOOD.replace('"c"', '" "'),
        GOOD.replace('"c"', '"\\u0000"'),
        GOOD.replace('"c"}', '"c","weight":0}'),
        GOOD.replace("assistant", "user"),
        GOOD[:-1],
    ],
)
def test_anything_else_goes_the_slow_way(text: str) -> None:
    assert fast_chat.accept(text.encode()) is None
