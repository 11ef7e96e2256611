"""The lint of a whole file: counts, lines, outputs, duplicates, and no crash on anything."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.domain.reports import MAX_FINDINGS, DatasetReport
from models.domain.rows import ChatRow
from worker.data.lint import LintOptions, Outputs, lint
from worker.data.normalised import read_rows

USER = {"role": "user", "content": "How deep is it?"}
ANSWER = {"role": "assistant", "content": "Four metres."}


def line(*messages: object, **more: object) -> bytes:
    return json.dumps({"messages": messages} | more, ensure_ascii=False).encode()


GOOD = line(USER, ANSWER)
Linted = Callable[..., DatasetReport]


@pytest.fixture
def linted(tmp_path: Path) -> Linted:
    """Lint bytes as a file; the keyword arguments are those of `LintOptions`."""

    def run(data: bytes, **options: Any) -> DatasetReport:
        path = tmp_path / "content"
        path.write_bytes(data)
        return lint(path, LintOptions(**options), outputs_in(tmp_path))

    return run


def outputs_in(folder: Path) -> Outputs:
    return Outputs(folder / "rows.arrow", folder / "findings.jsonl", folder / "cleaned.jsonl")


def numbered(number: int) -> bytes:
    return line({**USER, "content": f"What is {number}?"}, ANSWER)


def test_all_findings_are_counted_listed_and_written(linted: Linted, tmp_path: Path) -> None:
    report = linted(b"".join(numbered(n) + b"\n{}\n" for n in range(MAX_FINDINGS + 30)))
    assert (report.n_rows, report.n_valid_rows) == (2 * (MAX_FINDINGS + 30), MAX_FINDINGS + 30)
    assert report.n_findings == report.counts["missing_field"] == MAX_FINDINGS + 30
    assert [each.line for each in report.findings] == list(range(2, 2 * MAX_FINDINGS + 1, 2))
    written = [json.loads(each) for each in (tmp_path / "findings.jsonl").read_bytes().splitlines()]
    assert [each["line"] for each in written] == list(range(2, 2 * (MAX_FINDINGS + 30) + 1, 2))
    assert written[0]["offset"] == len(numbered(0)) + 1


def test_usable_rows_are_kept_with_their_lines(linted: Linted, tmp_path: Path) -> None:
    report = linted(numbered(1) + b"\n{\n" + numbered(3) + b"\n[]\n" + line(USER, ANSWER, tools=[{
        "type": "function", "function": {"name": "depth"}}]))  # fmt: skip
    kept = list(read_rows(tmp_path / "rows.arrow"))
    assert [number for number, _ in kept] == [1, 3, 5]
    assert all(isinstance(row, ChatRow) for _, row in kept)
    assert report.data_sha256
    cleaned = (tmp_path / "cleaned.jsonl").read_bytes().splitlines()
    assert cleaned[:2] == [numbered(1), numbered(3)]
    assert len(cleaned) == 3


def test_a_clean_file_needs_no_cleaned_copy(linted: Linted, tmp_path: Path) -> None:
    assert linted(GOOD).findings == []
    assert not (tmp_path / "cleaned.jsonl").exists()
    assert (tmp_path / "findings.jsonl").read_bytes() == b""


def test_the_digest_is_that_of_the_rows_and_not_of_the_file(linted: Linted) -> None:
    first = linted(numbered(1) + b"\n" + numbered(2)).data_sha256
    spaced = json.dumps(json.loads(numbered(2)), indent=1).encode()
    turned = json.dumps({"messages": [dict(reversed(m.items())) for m in json.loads(numbered(1))["messages"]]})  # fmt: skip  # noqa: E501
    for other in (
        b"\xef\xbb\xbf" + numbered(1) + b"\r\n" + numbered(2) + b"\r\n\r\n",
        gzip.compress(numbered(1) + b"\n" + numbered(2)),
        b"[" + numbered(1) + b",\n" + spaced + b"]",
        turned.encode() + b"\n" + numbered(2),
    ):
        assert linted(other).data_sha256 == first
    assert linted(numbered(2) + b"\n" + numbered(1)).data_sha256 != first
    assert linted(numbered(1)).data_sha256 != first


def test_a_shape_and_columns_can_be_given(linted: Linted) -> None:
    data = json.dumps({"dialogue": [USER, ANSWER]}).encode()
    assert linted(data).findings[0].code == "unknown_shape"
    report = linted(data, columns={"messages": "dialogue"})
    assert (report.shape, report.n_valid_rows) == ("openai_chat", 1)
    assert report.columns["messages"] == "dialogue"
    both = json.dumps({"prompt": "a", "completion": "b"}).encode()
    assert linted(both).form == "completion"
    chat = linted(both, shape="question_answer", columns={"answer": "completion"})
    assert (chat.form, chat.n_valid_rows) == ("chat", 1)
    assert "as asked for" in chat.evidence[1]
    assert linted(both, columns={"prompt": "promt"}).findings[0].code == "unknown_column"
    assert "Did you mean 'alpaca'" in linted(both, shape="alpacca").findings[0].hint


def test_one_kind_of_warning_does_not_hide_the_others(linted: Linted) -> None:
    repeated = line(USER, USER, ANSWER)
    data = b"\n".join([*(repeated for _ in range(40)), line(USER, ANSWER, note="x")])
    report = linted(data)
    assert report.counts["repeated_role"] == 40
    assert report.counts["duplicate_row"] == 39
    assert {each.code for each in report.warnings} == {
        "repeated_role",
        "duplicate_row",
        "ignored_field",
    }
    assert report.n_findings == 0


def test_labels_are_counted(linted: Linted) -> None:
    report = linted(b"text,label\nA gate,gate\nA crane,crane\nNo gate,gate\n", name="x.csv")
    assert report.labels == {"gate": 2, "crane": 1}


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00<["), min_size=1).filter(
    lambda text: text.translate(dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))).strip()
)


@st.composite
def chat_rows(draw: st.DrawFn) -> bytes:
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(words)})
        messages.append({"role": "assistant", "content": draw(words)})
    return json.dumps({"messages": messages}, ensure_ascii=draw(st.booleans())).encode()


FAULTS = [
    b"{",
    b'{"a": "\xff"}',
    b"[]",
    b"7",
    line(USER),
    b'{"a": 1, "a": 2}',
    b'{"a": NaN}',
    line(USER, {**ANSWER, "content": ""}),
    line(USER, {**ANSWER, "content": "a\x00"}),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(chat_rows(), min_size=1, max_size=8))
def test_what_is_written_well_is_clean(tmp_path_factory: Any, rows: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("clean")
    (folder / "x").write_bytes(b"\n".join(rows))
    report = lint(folder / "x", LintOptions(), outputs_in(folder))
    assert report.findings == []
    assert report.n_valid_rows == len(rows)
    texts = [
        [message.text for message in row.messages]
        for _, row in read_rows(folder / "rows.arrow")
        if isinstance(row, ChatRow)
    ]
    assert texts == [[m["content"] for m in json.loads(row)["messages"]] for row in rows]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(chat_rows(), min_size=3, max_size=12),
    st.dictionaries(st.integers(0, 11), st.sampled_from(FAULTS), max_size=5),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_planted_faults_are_found_at_exactly_their_lines(
    tmp_path_factory: Any, rows: list[bytes], planted: dict[int, bytes], end: bytes
) -> None:
    bad = {at for at in planted if 0 < at < len(rows)}
    content = [planted[at] if at in bad else row for at, row in enumerate(rows)]
    path = tmp_path_factory.mktemp("planted") / "x"
    path.write_bytes(end.join(content))
    report = lint(path)
    assert [each.line for each in report.findings] == sorted(at + 1 for at in bad)
    assert report.n_valid_rows == len(rows) - len(bad)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_break_the_lint(tmp_path_factory: Any, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "x").write_bytes(data)
    report = lint(folder / "x", LintOptions(), outputs_in(folder))
    assert report.n_valid_rows <= report.n_rows
    assert report.n_findings or report.n_valid_rows


def test_no_damage_to_a_file_breaks_the_lint(tmp_path: Path) -> None:
    draw = random.Random(17)
    originals = [
        line(USER, {**ANSWER, "content": 'é "x" \\ 🛥'}) + b"\n" + GOOD + b"\n",
        b"[" + GOOD + b",\n " + GOOD + b"]",
        b'question,answer\n"a, ""b""",c\n"d\ne",f\n',
        gzip.compress(GOOD + b"\n" + GOOD),
    ]
    scraps = [b"\x00", b"\xff", b'"', b"\\", b"\\ud800", b"NaN", b"[" * 70, b"\n", b"{", b"]", b","]
    path = tmp_path / "x"
    for _ in range(3000):
        data = bytearray(draw.choice(originals))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 9)] = draw.choice([*scraps, draw.randbytes(2)])
        path.write_bytes(data)
        report = lint(path)
        assert report.n_valid_rows <= report.n_rows
        assert report.n_findings or report.n_valid_rows


def test_the_lint_needs_neither_torch_nor_a_tokenizer() -> None:
    code = "import sys, worker.data.lint; print({'torch', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (loaded.returncode, loaded.stdout.strip()) == (0, "set()"), loaded.stderr
