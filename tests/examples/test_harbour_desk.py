"""The example data: written by its script, free of faults, learnable, and honestly held out."""

import json
import re
from pathlib import Path

import pytest

from examples.make_harbour_desk import HELDOUT_FILE, TRAINING_FILE, make
from models.domain.rows import ChatRow
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.data.lint import lint

FOLDER = Path(__file__).parents[2] / "examples"
TICKET = re.compile(r"\[TICKET\] topic: [a-z ]+; urgency: (high|normal|low); next step: [a-z ]+\.")


def rows(name: str) -> list[ChatRow]:
    values = (json.loads(line) for line in (FOLDER / name).read_bytes().splitlines())
    return [ChatRow.model_validate(value) for value in values]


def words(row: ChatRow) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", row.messages[0].text.lower()))


def test_the_script_reproduces_the_files() -> None:
    training, heldout = make()
    assert (FOLDER / TRAINING_FILE).read_text(encoding="utf-8") == training
    assert (FOLDER / HELDOUT_FILE).read_text(encoding="utf-8") == heldout


@pytest.mark.parametrize(("name", "least"), [(TRAINING_FILE, 220), (HELDOUT_FILE, 20)])
def test_every_row_is_clean_and_distinct(name: str, least: int) -> None:
    report = lint(FOLDER / name)
    assert report.findings == []
    assert report.n_valid_rows >= least
    questions = [row.messages[0].text for row in rows(name)]
    assert len(set(questions)) == len(questions)
    assert all(TICKET.fullmatch(row.messages[-1].text) for row in rows(name))


@pytest.mark.parametrize("name", [TRAINING_FILE, HELDOUT_FILE])
def test_rows_are_short_and_teach_the_whole_ticket(
    smollm2: tuple[Path, BaseModelInfo], name: str
) -> None:
    renderer = ChatRenderer(load_tokenizer(smollm2[0]))
    rendered = [renderer.render(row) for row in rows(name)]
    assert all(20 <= row.n_trained <= 45 for row in rendered)
    lengths = [len(row.input_ids) for row in rendered]
    assert sum(lengths) / len(lengths) <= 90
    assert max(lengths) <= 110


def test_held_out_tickets_are_known_but_their_questions_are_new() -> None:
    training, heldout = rows(TRAINING_FILE), rows(HELDOUT_FILE)
    known = {row.messages[-1].text for row in training}
    for row in heldout:
        assert row.messages[-1].text in known
        nearest = max(len(words(row) & words(o)) / len(words(row) | words(o)) for o in training)
        assert nearest < 0.75, f"nearly a copy of a training row: {row.messages[0].text}"
