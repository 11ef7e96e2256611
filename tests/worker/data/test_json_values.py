"""What is refused in the JSON of a row, by its own code, and what is let through unchanged."""

import json
import random

import orjson
import pytest

from worker.data.json_values import load
from worker.data.records import Fault


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        (b'{"messages": [', "invalid_json", "column 15"),
        (b"{'messages': []}", "invalid_json", "double quotes"),
        (b'{"a": 1}{"a": 1}', "invalid_json", "column 9"),
        (b'{"a": "\xe9"}', "invalid_encoding", "byte 107 of the file (0xE9)"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_encoding", "byte 107"),
        (b'{"a": "b\x00"}', "invalid_character", "byte 108 of the file is NUL"),
        (rb'{"a": "\ud800"}', "invalid_character", "surrogate"),
        (rb'{"a": {"b": ["x\u0000"]}}', "invalid_character", "NUL"),
        (b'{"a": NaN}', "non_finite_number", "column 7"),
        (b'{"a": -Infinity}', "non_finite_number", "finite number"),
        (b'{"a": 1e999}', "non_finite_number", "finite number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate_key", 'the key "c"'),
        (rb'{"a": 1, "a": "\u0022\u0022"}', "duplicate_key", 'the key "a"'),
        (rb'{"a": 1, "\u0061": 2}', "duplicate_key", 'the key "a"'),
        (b"[" * 65 + b"]" * 65, "too_deep", "64"),
        (b"[" * 100_000, "too_deep", "64"),
        (b'{"a":' * 1000, "too_deep", "64"),
    ],
)
def test_bad_json_is_refused_by_what_is_wrong(text: bytes, code: str, part: str) -> None:
    fault = load(text, 100)
    assert isinstance(fault, Fault)
    assert fault.code == code
    assert part in f"{fault.message} {fault.hint}"
    assert fault.hint


def test_the_place_of_nul_is_told() -> None:
    fault = load(rb'{"a": {"b": ["x", "y\u0000"]}}')
    assert isinstance(fault, Fault)
    assert fault.path == "a.b[1]"


@pytest.mark.parametrize(
    "text",
    [
        b" {} ",
        b"null",
        b"[" * 64 + b"]" * 64,
        '{"a": "é \\"x\\" \\\\ 🛥 \\u2028 \u2028 \x85"}'.encode(),
        rb'{"a": "\u0022\ud83d\udea4", "b": "\\u0000 \\ud800"}',
        b'{"a": 1e308, "b": -0.0, "c": 123456789012345678}',
    ],
)
def test_good_json_is_what_the_standard_library_reads(text: bytes) -> None:
    assert load(text) == json.loads(text)


def test_damage_is_a_fault_or_plain_json() -> None:
    draw = random.Random(5)
    original = (
        '{"messages": [{"role": "user", "content": "é \\"x\\" \\\\ 🛥"}], "b": [1, {}]}'.encode()
    )
    scraps = [b"\x00", b"\xff", b'"', b"\\", b"\\u0022", b"\\ud800", b"NaN", b"[" * 70, b"1e999"]
    for _ in range(5000):
        data = bytearray(original)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 9)] = draw.choice([*scraps, draw.randbytes(2)])
        value = load(bytes(data))
        if not isinstance(value, Fault):
            assert value == orjson.loads(bytes(data))
