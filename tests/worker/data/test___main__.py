"""``tunery data check``: the report for people, for programs, and as an exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CORPUS = Path(__file__).parents[2] / "data" / "corpus"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.cli", "data", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_json_has_every_finding_and_the_status_says_whether_there_is_one() -> None:
    result = check("--json", str(CORPUS / "three-faults.jsonl"))
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    assert (report["rows"], report["usable"], report["shape"]) == (6, 3, "openai_chat")
    assert [each["line"] for each in report["errors"]] == [2, 4, 6]
    assert set(report["errors"][0]) == {"line", "path", "code", "message", "hint", "offset"}
    assert report["warnings"] == []
    good = check("--json", str(CORPUS / "chat.jsonl"))
    assert (good.returncode, json.loads(good.stdout)["errors"]) == (0, [])


def test_people_get_lines_places_and_remedies() -> None:
    result = check(str(CORPUS / "near-duplicate.jsonl"))
    assert result.returncode == 0, result.stderr
    assert "3 of 3 rows are usable" in result.stdout
    assert "near_duplicate_row" in result.stdout


def test_columns_and_shape_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "a", "a": "b"}\n')
    assert check(str(path)).returncode == 1
    said = check(
        "--json", "--shape", "question_answer", "--columns", "question=q,answer=a", str(path)
    )
    assert (said.returncode, json.loads(said.stdout)["form"]) == (0, "chat")


@pytest.mark.parametrize("columns", ["question", "=x"])
def test_columns_in_a_wrong_form_are_refused(columns: str) -> None:
    result = check("--columns", columns, str(CORPUS / "chat.jsonl"))
    assert result.returncode == 2
    assert "OURS=THEIRS" in result.stderr
