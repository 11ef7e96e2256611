"""Every fault of an uploaded data set is found at its line, with its place and a remedy."""

import json
import random
import subprocess
import sys
from typing import Any

import pytest

from models.domain.reports import MAX_FINDINGS, RowFinding
from models.domain.rows import ChatRow
from worker.data.lines import MAX_LINE_BYTES
from worker.data.lint import lint, read_rows

USER = {"role": "user", "content": "How deep is it?"}
ANSWER = {"role": "assistant", "content": "Four metres."}
CALL = {"id": "c", "type": "function", "function": {"name": "depth", "arguments": "{}"}}


def line(*messages: object, **more: object) -> bytes:
    return json.dumps({"messages": messages} | more, ensure_ascii=False).encode()


GOOD = line(USER, ANSWER)


def only_finding(data: bytes) -> RowFinding:
    report = lint([data])
    assert report.n_findings == len(report.findings) == 1, report.findings
    return report.findings[0]


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        GOOD + b"\n",
        GOOD + b"\r\n" + GOOD + b"\r\n",
        GOOD + b"\n \r\n\n",
        b"\xef\xbb\xbf" + GOOD,
        b"  " + GOOD + b"\t",
        line({"role": "developer", "content": "Be brief."}, USER, ANSWER),
        line({"role": "user", "content": [{"type": "text", "text": "Depth?"}]}, ANSWER),
        line(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}),
        line(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        line(USER, ANSWER, tools=[{"type": "function"}], parallel_tool_calls=False),
        line(USER, {**ANSWER, "content": 'a "quoted" \\ word, \u2028 \u0085 and \\u0000'}),
        rb'{"messages":[{"role":"user","content":"\u0022\ud83d\udea4"},'
        rb'{"role":"assistant","content":"\\u0000 \\ud800"}]}',
    ],
)
def test_good_files_have_no_findings(data: bytes) -> None:
    report = lint([data])
    assert report.findings == []
    assert report.n_rows == report.n_valid_rows == data.count(b"messages")


@pytest.mark.parametrize(
    ("data", "code", "part"),
    [
        (b"", "empty_file", "no rows"),
        (b"\xef\xbb\xbf\n \r\n", "empty_file", "no rows"),
        (b'{"messages": [', "invalid_json", "column 15"),
        (b"{'messages': []}", "invalid_json", "double quotes"),
        (GOOD + GOOD, "invalid_json", f"column {len(GOOD) + 1}"),
        (b'{"a": "\xe9"}', "invalid_encoding", "byte 7 of the file (0xE9)"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_encoding", "byte 7"),
        (GOOD.decode().encode("utf-16"), "invalid_encoding", "UTF-16"),
        (GOOD.decode().encode("utf-16-le"), "invalid_encoding", "UTF-16"),
        (GOOD.decode().encode("utf-16-be"), "invalid_encoding", "offset 0"),
        (b'{"a": "b\x00"}', "invalid_character", "byte 8 of the file is NUL"),
        (rb'{"a": "\ud800"}', "invalid_character", "surrogate"),
        (b'{"a": NaN}', "non_finite_number", "column 7"),
        (b'{"a": -Infinity}', "non_finite_number", "finite number"),
        (b'{"a": 1e999}', "non_finite_number", "finite number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate_key", 'the key "c"'),
        (rb'{"a": 1, "a": "\u0022\u0022"}', "duplicate_key", 'the key "a"'),
        (rb'{"a": 1, "\u0061": 2}', "duplicate_key", 'the key "a"'),
        (b"[" * 65 + b"]" * 65, "too_deep", "64"),
        (b"[" * 100_000, "too_deep", "64"),
        (b'{"a":' * 1000, "too_deep", "64"),
        (b"[" + GOOD + b"]", "not_an_object", "an array"),
        (b'"text"', "not_an_object", "a string"),
        (b"null", "not_an_object", "null"),
        (b"x" * (MAX_LINE_BYTES + 1), "line_too_long", "8,388,609 bytes"),
    ],
)
def test_broken_files_are_named_by_what_broke(data: bytes, code: str, part: str) -> None:
    finding = only_finding(data)
    assert (finding.code, finding.line) == (code, 1)
    assert part in finding.sentence()
    assert finding.hint


@pytest.mark.parametrize(
    ("row", "code", "path", "part"),
    [
        ({}, "missing_field", "messages", '"messages"'),
        ({"prompt": "a", "completion": "b"}, "missing_field", "messages", "prompt and completion"),
        ({"conversations": []}, "missing_field", "messages", "ShareGPT"),
        ({"mesages": [USER, ANSWER]}, "unknown_field", "mesages", "Did you mean 'messages'?"),
        ({"messages": [USER, ANSWER], "id": 3}, "unknown_field", "id", "Known are messages"),
        ({"messages": [USER, {"role": "assistant", "contnet": "x"}]}, "unknown_field",
         "messages[1].contnet", "Did you mean 'content'?"),
        ({"messages": [{**USER, "function_call": {}}, ANSWER]}, "unknown_field",
         "messages[0].function_call", "tool_calls"),
        ({"messages": []}, "no_messages", "messages", "at least one"),
        ({"messages": "hello"}, "wrong_type", "messages", "expected an array, got a string"),
        ({"messages": [USER, "hello"]}, "wrong_type", "messages[1]", "expected an object"),
        ({"messages": [{"content": "x"}, ANSWER]}, "missing_field", "messages[0].role", "user"),
        ({"messages": [{"role": "human", "content": "x"}, ANSWER]}, "unknown_role",
         "messages[0].role", "Did you mean 'user'? Use one of system, developer, user"),
        ({"messages": [{"role": "function", "content": "x"}, ANSWER]}, "unknown_role",
         "messages[0].role", "Use one of system"),
        ({"messages": [{"role": 3, "content": "x"}]}, "wrong_type", "messages[0].role", "a number"),
        ({"messages": [{**USER, "content": 3}, ANSWER]}, "wrong_type", "messages[0].content",
         "expected a string or an array of text parts, got a number"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": None}]}]}, "wrong_type",
         "messages[0].content[0].text", "got null"),
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}]},
         "unsupported_content", "messages[0].content[0].type", "Only text"),
        ({"messages": [USER, ANSWER], "tools": [3]}, "wrong_type", "tools[0]", "an object"),
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
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing_to_learn", "messages", "weight"),
        ({"messages": [USER, {**ANSWER, "content": "a\x00"}]}, "invalid_character",
         "messages[1].content", "NUL"),
        ({"messages": [USER, ANSWER], "tools": [{"a": {"b\x00": 1}}]}, "invalid_character",
         "tools[0].a", "NUL"),
    ],
)  # fmt: skip
def test_faulty_rows_are_named_by_place_and_remedy(
    row: dict[str, Any], code: str, path: str, part: str
) -> None:
    finding = only_finding(GOOD + b"\n" + json.dumps(row).encode())
    assert (finding.code, finding.path, finding.line) == (code, path, 2)
    assert part in finding.sentence()


def test_a_pretty_printed_document_is_explained() -> None:
    report = lint([json.dumps([json.loads(GOOD)], indent=1).encode()])
    assert "pretty-printed" in report.findings[0].hint
    assert report.n_valid_rows == 0


def test_blank_lines_inside_a_file_are_one_finding_for_each_run() -> None:
    report = lint([GOOD + b"\n\n\r\n" + GOOD + b"\n\n" + GOOD + b"\n\n"])
    assert [(found.line, found.code) for found in report.findings] == [
        (2, "blank_line"),
        (5, "blank_line"),
    ]
    assert "lines 2 to 3 are blank" in report.findings[0].message
    assert (report.n_rows, report.n_valid_rows) == (3, 3)


def test_a_line_separator_inside_a_string_does_not_end_the_row() -> None:
    data = line(USER, {**ANSWER, "content": "one\u2028two\u2029three\x85\x1c"})
    ((number, row),) = read_rows([data])
    assert number == 1
    assert isinstance(row, ChatRow)
    assert row.messages[1].text == "one\u2028two\u2029three\x85\x1c"


def test_line_numbers_are_right_wherever_faults_and_chunks_fall() -> None:
    draw = random.Random(11)
    faults = [b"{", b'{"a": "\xff"}', b"[]", b"7", line(USER), b'{"a": 1, "a": 2}', b'{"a": NaN}']
    for _ in range(40):
        bad = set(draw.sample(range(1, 61), k=draw.randint(0, 20)))
        rows = [draw.choice(faults) if number in bad else GOOD for number in range(1, 61)]
        data = draw.choice([b"\n", b"\r\n"]).join(rows)
        size = draw.randint(1, 500)
        outcomes = list(read_rows(data[at : at + size] for at in range(0, len(data), size)))
        assert [number for number, _ in outcomes] == list(range(1, 61))
        found = {number for number, row in outcomes if isinstance(row, RowFinding)}
        assert found == bad
        assert all(row.line == number for number, row in outcomes if isinstance(row, RowFinding))


def test_reading_goes_on_after_a_line_that_is_too_long() -> None:
    long = b'{"x": "' + b"y" * MAX_LINE_BYTES + b'"}'
    outcomes = list(read_rows([GOOD + b"\n" + long, b"\n", GOOD]))
    assert [number for number, _ in outcomes] == [1, 2, 3]
    assert isinstance(outcomes[2][1], ChatRow)


def test_only_the_first_findings_are_kept_but_all_are_counted() -> None:
    report = lint(b"{}\n" for _ in range(MAX_FINDINGS + 30))
    assert (report.n_rows, report.n_valid_rows) == (MAX_FINDINGS + 30, 0)
    assert report.n_findings == MAX_FINDINGS + 30
    assert [found.line for found in report.findings] == list(range(1, MAX_FINDINGS + 1))


def test_no_damage_to_a_file_breaks_the_lint() -> None:
    draw = random.Random(17)
    original = line(USER, {**ANSWER, "content": 'é "x" \\ 🛥', "tool_calls": [CALL]}) + b"\n"
    scraps = [
        b"\x00",
        b"\xff",
        b'"',
        b"\\",
        b"\\u0022",
        b"\\ud800",
        b"NaN",
        b"[" * 70,
        b"\n",
        b"1e999",
    ]
    for _ in range(3000):
        data = bytearray(original * 2)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 9)] = draw.choice([*scraps, draw.randbytes(2)])
        report = lint([bytes(data)])
        assert report.n_valid_rows <= report.n_rows
        assert bool(report.findings) == (report.n_valid_rows < report.n_rows)


def test_what_the_user_wrote_is_never_echoed_at_length() -> None:
    long = "k" * 100_000
    for row in ({long: 1}, {"messages": [{"role": long}]}, {"messages": [{long: {long: 1}}]}):
        assert len(only_finding(json.dumps(row).encode()).sentence()) < 500
    assert len(only_finding(f'{{"{long}": 1, "{long}": 2}}'.encode()).sentence()) < 500


def test_the_lint_needs_neither_torch_nor_a_tokenizer() -> None:
    code = "import sys, worker.data.lint; print({'torch', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (loaded.returncode, loaded.stdout.strip()) == (0, "set()"), loaded.stderr
