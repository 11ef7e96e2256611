"""Rows become examples once: reused by the next job, rebuilt when anything differs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.domain.training import TrainingSpec
from models.errors import TrainingFailedError
from models.storage import LocalStore, put_file
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.data.lint import LintOptions, Outputs, lint
from worker.data.tokens import tokenizer_sha256
from worker.training import prepare
from worker.training.prepare import DataFile, Tools, load_examples

ROW = '{"messages": [{"role": "user", "content": "What is %d?"}, {"role": "assistant", "content": "It is %d."}]}'  # noqa: E501
Prepared = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def renderer(smollm2: tuple[Path, BaseModelInfo]) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(smollm2[0]))


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., DataFile]:
    def make(param: Any, numbers: range) -> DataFile:
        path = tmp_path / f"{param}.jsonl"
        path.write_text("\n".join(ROW % (number, number) for number in numbers))
        report = lint(path, LintOptions(), Outputs(tmp_path / "rows.arrow"))
        key = f"datasets/{param}/rows.arrow"
        put_file(LocalStore(tmp_path / "objects"), key, tmp_path / "rows.arrow")
        return DataFile(f"file-{param}", param, key, report.data_sha256, 0, report.form)

    return make


class Stage:
    def __init__(self, folder: Path, tokenizer: Path, renderer: ChatRenderer) -> None:
        self.tokenizer = tokenizer
        self.store = LocalStore(folder / "objects")
        self.warnings: list[str] = []
        self._folder = folder
        self._renderer = renderer
        self._n_runs = 0

    def load(
        self, train: DataFile, valid: DataFile | None = None, **changes: Any
    ) -> tuple[list[int], list[int]]:
        """Return the lines to train and to validate on."""
        spec = TrainingSpec.model_validate(
            {"model": "m", "training_file": "f", "seed": 7, "objective": {}, "peft": {}, **changes}
        )
        self._n_runs += 1
        scratch = self._folder / f"scratch-{self._n_runs}"
        scratch.mkdir()
        tokenizer = tokenizer_sha256(self._renderer._tokenizer)
        tools = Tools(
            self.store, scratch, self.tokenizer, self._renderer, tokenizer, self.warnings.append
        )
        both = load_examples(train, valid, spec, 64, tools)
        return [each.line for each in both[0]], [each.line for each in both[1]]

    def n_cached(self) -> int:
        return len(self.store.list("tokens"))


@pytest.fixture
def stage(tmp_path: Path, smollm2: tuple[Path, BaseModelInfo], renderer: ChatRenderer) -> Stage:
    return Stage(tmp_path, smollm2[0], renderer)


def test_tokens_are_made_once_and_reused(
    stage: Stage, make_file: Callable[..., DataFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = make_file("training_file", range(10))
    assert stage.load(train) == (list(range(1, 11)), [])
    assert stage.n_cached() == 1
    monkeypatch.setattr(prepare, "tokenise", None)
    assert stage.load(train) == (list(range(1, 11)), [])


@pytest.mark.parametrize(
    "changes", [{"on_error": "skip"}, {"on_overlong": "drop"}, {"validation_split": 0.3}]
)
def test_what_decides_the_tokens_is_never_mixed_up(
    stage: Stage, make_file: Callable[..., DataFile], changes: dict[str, Any]
) -> None:
    train = make_file("training_file", range(10))
    stage.load(train)
    stage.load(train, **changes)
    assert stage.n_cached() > 1


def test_a_split_holds_rows_out_by_the_seed(
    stage: Stage, make_file: Callable[..., DataFile]
) -> None:
    train = make_file("training_file", range(20))
    first = stage.load(train, validation_split=0.25)
    assert sorted(first[0] + first[1]) == list(range(1, 21))
    assert len(first[1]) == 5
    assert stage.load(train, validation_split=0.25) == first
    assert stage.load(train, validation_split=0.25, seed=8) != first
    assert stage.warnings == []


def test_rows_that_both_files_have_are_told(
    stage: Stage, make_file: Callable[..., DataFile]
) -> None:
    train = make_file("training_file", range(10))
    valid = make_file("validation_file", range(8, 12))
    stage.load(train, valid)
    (warning,) = stage.warnings
    assert warning.startswith("2 rows of the validation file are in the training file as well")
    assert "line 1 = line 9, line 2 = line 10" in warning


def test_a_file_that_is_gone_is_named(stage: Stage, make_file: Callable[..., DataFile]) -> None:
    train = make_file("training_file", range(4))
    stage.store.delete(train.normalised_key)
    with pytest.raises(TrainingFailedError) as gone:
        stage.load(train)
    assert (gone.value.code, gone.value.param) == ("file_not_found", "training_file")


def test_large_files_are_tokenised_in_a_process_of_their_own(
    stage: Stage, make_file: Callable[..., DataFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = make_file("training_file", range(10))
    here = stage.load(train, validation_split=0.3)
    for cached in stage.store.list("tokens"):
        stage.store.delete(cached.key)
    monkeypatch.setattr(prepare, "CHILD_FROM_BYTES", 0)
    monkeypatch.setattr(prepare, "tokenise", None)
    assert stage.load(train, validation_split=0.3) == here
