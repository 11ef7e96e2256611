"""Tokens come back from the disk as they were, and under a key that nothing escapes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worker.data import tokens
from worker.data.tokens import TokenFile, TokenKey, TokenWriter
from worker.training.objectives.base import Example

KEY = TokenKey(
    data_sha256="d" * 64,
    tokenizer_sha256="t" * 64,
    template_sha256="c" * 64,
    max_length=2048,
    on_error="fail",
    on_overlong="error",
)


def example(line: int, n_tokens: int) -> Example:
    generator = np.random.default_rng(line)
    trained = generator.random(n_tokens) < 0.5
    ids = generator.integers(0, 2**31 - 1, n_tokens, dtype=np.int32)
    return Example(line, ids, trained, int(trained.sum()))


def written(path: Path, examples: list[Example], **notes: Any) -> TokenFile:
    with TokenWriter(path) as writer:
        for one in examples:
            writer.append(one)
        writer.notes = notes
    return TokenFile(path)


@pytest.mark.parametrize("batch_tokens", [1, 50, 1 << 20])
def test_examples_come_back_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(tokens, "BATCH_TOKENS", batch_tokens)
    examples = [example(line, line % 23 + 1) for line in range(1, 200)]
    file = written(tmp_path / "x.arrow", examples, n_skipped=3)
    assert len(file) == len(examples)
    for original, mapped in zip(examples, file, strict=True):
        assert mapped.line == original.line
        assert mapped.n_trained == original.n_trained
        assert mapped.input_ids.dtype == np.int32
        assert mapped.trained.dtype == np.bool_
        assert (mapped.input_ids == original.input_ids).all()
        assert (mapped.trained == original.trained).all()
    assert file.lengths.tolist() == [len(one.input_ids) for one in examples]
    assert file[-1].line == 199
    assert [one.line for one in file[5:8]] == [6, 7, 8]
    assert file.notes == {"n_skipped": 3}
    with pytest.raises(IndexError):
        file[199]


def test_a_file_without_examples_is_empty(tmp_path: Path) -> None:
    file = written(tmp_path / "x.arrow", [], reason="all rows were dropped")
    assert len(file) == 0
    assert file.lengths.tolist() == []
    assert file.notes["reason"] == "all rows were dropped"


def test_mapped_examples_cost_no_memory_of_their_own(tmp_path: Path) -> None:
    file = written(tmp_path / "x.arrow", [example(1, 1000)])
    assert not file[0].input_ids.flags.owndata
    assert not file[0].input_ids.flags.writeable


@pytest.mark.parametrize("field", list(TokenKey.model_fields))
def test_every_field_changes_the_key(field: str) -> None:
    value = getattr(KEY, field)
    other = KEY.model_copy(update={field: f"{value}x" if isinstance(value, str) else value + 1})
    assert other.digest() != KEY.digest()


def test_the_code_and_the_libraries_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.digest()
    assert before == KEY.model_copy().digest()
    tokens.code_sha256.cache_clear()
    monkeypatch.setattr(tokens, "version", lambda library: "99")
    assert KEY.digest() != before
    monkeypatch.undo()
    tokens.code_sha256.cache_clear()
    monkeypatch.setattr(tokens, "_CODE", ("worker.data.records",))
    assert KEY.digest() != before
    monkeypatch.undo()
    tokens.code_sha256.cache_clear()
    assert KEY.digest() == before


def test_tokenizers_that_differ_have_different_digests(smollm2: tuple[Path, object]) -> None:
    from worker.base_models import load_tokenizer

    first, second = load_tokenizer(smollm2[0]), load_tokenizer(smollm2[0])
    assert tokens.tokenizer_sha256(first) == tokens.tokenizer_sha256(second)
    second.add_tokens(["<|more|>"])
    assert tokens.tokenizer_sha256(first) != tokens.tokenizer_sha256(second)
