"""The preview shows what is trained: the same ids, the same mask, and honest numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.domain.rows import ChatRow
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.data.preview import count_tokens, preview_row
from worker.training.batches import RowPolicy, build_dataset
from worker.training.objectives.base import Example

Base = tuple[Path, BaseModelInfo]


def row(answer: str) -> ChatRow:
    messages = [{"role": "user", "content": "水深?"}, {"role": "assistant", "content": answer}]
    return ChatRow.model_validate({"messages": messages})


ROWS = [(1, row("四メートル🚤")), (2, row("أربعة " * 40)), (3, row("Four."))]
UNRENDERABLE = ChatRow.model_validate({"messages": [{"role": "assistant", "content": "x"}]})


@pytest.mark.parametrize("max_length", [64, 4096])
def test_the_ids_and_the_mask_are_those_of_training(smollm2: Base, max_length: int) -> None:
    tokenizer = load_tokenizer(smollm2[0])
    renderer = ChatRenderer(tokenizer)
    examples: list[Example] = []
    policy = RowPolicy("fail", "truncate", max_length)
    build_dataset(ROWS, renderer, policy, "training_file", examples)
    for (line, each), example in zip(ROWS, examples, strict=True):
        shown = preview_row(line, each, renderer, tokenizer, max_length)
        assert shown.input_ids == example.input_ids.tolist()
        mask = [span.trained for span in shown.spans for _ in range(span.start, span.end)]
        assert mask == example.trained.tolist()
        assert shown.n_trained == example.n_trained
        assert shown.truncated == (shown.n_tokens > max_length)
        assert shown.row["messages"][0]["content"] == "水深?"


def test_the_trained_text_is_the_answer(smollm2: Base) -> None:
    tokenizer = load_tokenizer(smollm2[0])
    shown = preview_row(1, ROWS[0][1], ChatRenderer(tokenizer), tokenizer, 4096)
    assert [span.text for span in shown.spans if span.trained] == ["四メートル🚤<|im_end|>"]


def test_statistics_count_every_row_once(smollm2: Base) -> None:
    renderer = ChatRenderer(load_tokenizer(smollm2[0]))
    lengths = [len(renderer.render(each).input_ids) for _, each in ROWS]
    found = count_tokens([*ROWS, (4, UNRENDERABLE)], renderer, 64)
    assert (found.n_rows, found.n_faulty) == (4, 1)
    assert (found.n_tokens, found.longest) == (sum(lengths), max(lengths))
    assert found.n_overlong == sum(length > 64 for length in lengths) > 0
    assert sum(found.histogram.values()) == 3


def test_a_row_that_cannot_be_rendered_says_why(smollm2: Base) -> None:
    tokenizer = load_tokenizer(smollm2[0])
    shown = preview_row(7, UNRENDERABLE, ChatRenderer(tokenizer), tokenizer, 64)
    assert shown.fault.startswith("Line 7")
    assert shown.input_ids == []


def test_the_command_prints_rows_and_statistics(
    smollm2: Base, base_model_cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nDepth?,Four.\nTide?,High.\n")
    command = [sys.executable, "-m", "api.cli", "data", "preview", "--json", "--rows", "1"]
    result = subprocess.run(
        [*command, str(path)],
        env=os.environ | {"TUNERY_MODELS__CACHE_DIR": str(base_model_cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert [each["line"] for each in shown["rows"]] == [2]
    assert shown["statistics"]["n_rows"] == 2
