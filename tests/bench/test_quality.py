"""What bench.quality draws, and how it judges: no test document is trained or chosen on."""

from pathlib import Path
from typing import Any

import pytest

from bench import quality
from bench._quality_worker import (
    FULL,
    LABELS,
    LORA,
    PACKAGE,
    PROBE,
    QLORA,
    TEST_PER_CLASS,
    TRAIN_PER_CLASS,
    VALID_PER_CLASS,
    documents,
)


def _runs(*accuracies: float, loss: float = 1.0) -> list[dict[str, Any]]:
    return [
        {
            "accuracy": accuracy,
            "loss": loss,
            "trainable": 1234,
            "learning_rate": 1e-3,
            "steps": 104,
            "cpu_seconds": 30.0 + at,
            "peak_bytes": (at + 1) * 2**20,
        }
        for at, accuracy in enumerate(accuracies)
    ]


def test_no_seed_draws_a_test_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in LABELS:
        folder = tmp_path / PACKAGE / "bbcnews" / "data" / label
        folder.mkdir(parents=True)
        for at in range(TEST_PER_CLASS + TRAIN_PER_CLASS + VALID_PER_CLASS + 5):
            (folder / f"{at:03}.txt").write_text(f"{label} {at}")
    (tmp_path / PACKAGE / "__init__.py").write_text("raise ImportError('read, never imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    drawn = [documents(seed) for seed in (0, 1)]
    parts = [{name: {row.text for row in rows} for name, rows in each.items()} for each in drawn]
    for each in parts:
        n_each = {name: len(texts) / len(LABELS) for name, texts in each.items()}
        assert n_each == {
            "train": TRAIN_PER_CLASS,
            "valid": VALID_PER_CLASS,
            "test": TEST_PER_CLASS,
        }
        assert not each["train"] & each["valid"]
        assert not (each["train"] | each["valid"]) & each["test"]
    assert parts[0]["test"] == parts[1]["test"]
    assert parts[0]["train"] != parts[1]["train"]


def test_a_row_has_the_mean_of_the_seeds_and_the_highest_peak() -> None:
    assert quality.cells(_runs(0.9, 0.91, 0.95)) == [
        "90.0 / 91.0 / 95.0",
        "92.0",
        "1,234",
        "0.001",
        "104",
        "31",
        "3",
    ]


def test_what_misses_a_goal_is_named_with_the_difference() -> None:
    figures = {
        PROBE: _runs(0.80),
        FULL: _runs(0.90),
        LORA: _runs(0.90),
        QLORA: _runs(0.889),
        "weak": _runs(0.84),
    }
    assert quality.misses(figures) == [
        f"weak is +4.0 points from {PROBE}; the goal is +5.",
        f"weak is -6.0 points from {FULL}; the goal is -2.",
        f"{QLORA} is -1.1 points from {LORA}; the goal is -1.",
    ]
    assert quality.misses({"alone": _runs(0.2)}) == []


def test_the_best_rate_has_the_lowest_validation_loss() -> None:
    by_factor = {"÷ 3": _runs(0.95, loss=0.5), "default": _runs(0.9, loss=0.3)}
    assert quality.best_factor(by_factor) == "default"
