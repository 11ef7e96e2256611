"""Tokenising in a process of its own gives what it gives in this one, and never loads torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.errors import TrainingFailedError
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.data.lint import LintOptions, Outputs, lint
from worker.data.tokens import TokenFile
from worker.training import tokenise as module
from worker.training.batches import RowPolicy
from worker.training.tokenise import TokeniseOrder, tokenise, tokenise_in_child

N_ROWS = 40


def order(folder: Path, name: str, **changes: object) -> TokeniseOrder:
    rows = folder / "rows.arrow"
    if not rows.exists():
        turns = [
            [
                {"role": "user", "content": f"Wie tief? {n} 水深 <|im_end|>"},
                {"role": "assistant", "content": f"{n} m"},
            ]
            for n in range(N_ROWS)
        ]
        data = folder / "data.jsonl"
        data.write_text("\n".join(json.dumps({"messages": each}) for each in turns))
        lint(data, LintOptions(), Outputs(rows))
    given = {
        "rows": rows,
        "tokens": folder / f"{name}.arrow",
        "policy": RowPolicy("fail", "error", 64),
        "param": "training_file",
    }
    return TokeniseOrder.model_validate(given | changes)


def test_the_child_writes_the_same_file(
    tmp_path: Path, smollm2: tuple[Path, BaseModelInfo]
) -> None:
    chosen = tmp_path / "chosen.npy"
    np.save(chosen, np.arange(N_ROWS) % 3 == 0)
    here, there = order(tmp_path, "here", chosen=chosen), order(tmp_path, "there", chosen=chosen)
    tokenise(here, ChatRenderer(load_tokenizer(smollm2[0])))
    tokenise_in_child(there, smollm2[0])
    assert here.tokens.read_bytes() == there.tokens.read_bytes()
    file = TokenFile(there.tokens)
    assert [each.line for each in file] == list(range(1, N_ROWS + 1, 3))
    assert file.notes["n_examples"] == len(file)


def test_what_the_child_refuses_is_raised_here(
    tmp_path: Path, smollm2: tuple[Path, BaseModelInfo]
) -> None:
    short = RowPolicy("fail", "error", 8)
    with pytest.raises(TrainingFailedError) as here:
        tokenise(order(tmp_path, "a", policy=short), ChatRenderer(load_tokenizer(smollm2[0])))
    with pytest.raises(TrainingFailedError) as there:
        tokenise_in_child(order(tmp_path, "b", policy=short), smollm2[0])
    assert there.value.to_dict() == here.value.to_dict()
    assert there.value.code == "invalid_file_format"
    assert there.value.param == "training_file"


def test_a_child_that_dies_is_not_taken_for_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit status 1"):
        tokenise_in_child(order(tmp_path, "a"), tmp_path / "no-such-model")


def test_the_module_does_not_bring_torch_with_it() -> None:
    code = f"import sys, {module.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
