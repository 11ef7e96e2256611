"""Rows to examples under every policy, and the order of batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from models.domain.rows import ChatRow, Row, TextRow
from models.errors import TrainingFailedError
from tests.worker.training.tiny import make_examples
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.masker import Rendered
from worker.row_error import RowError
from worker.training.batches import (
    RowCounts,
    RowPolicy,
    build_dataset,
    epoch_batches,
    micro_batches,
)
from worker.training.objectives.base import Example

PARAM: Literal["training_file"] = "training_file"


@pytest.fixture(scope="module")
def renderer(smollm2: tuple[Path, BaseModelInfo]) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(smollm2[0]))


def row(question: str = "Hi", answer: str = "Hello.", **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **more},
        ]
    }


UNRENDERABLE: Any = {"messages": [{"role": "assistant", "content": "Unasked."}]}


@dataclass
class Built:
    examples: list[Example]
    counts: RowCounts


def build(
    renderer: ChatRenderer,
    *values: Any,
    on_error: Literal["fail", "skip"] = "fail",
    on_overlong: Literal["error", "drop", "truncate"] = "error",
    max_length: int = 200,
) -> Built:
    policy = RowPolicy(on_error, on_overlong, max_length)
    rows = ((line, ChatRow.model_validate(value)) for line, value in enumerate(values, 1))
    examples: list[Example] = []
    counts = build_dataset(rows, renderer, policy, "training_file", examples)
    assert counts.n_examples == len(examples)
    return Built(examples, counts)


def test_an_example_holds_what_the_renderer_says(renderer: ChatRenderer) -> None:
    (example,) = build(renderer, row()).examples
    rendered = renderer.render(ChatRow.model_validate(row()))
    assert example.input_ids.tolist() == rendered.input_ids
    assert example.trained.tolist() == rendered.trained
    assert (example.line, example.n_trained) == (1, rendered.n_trained)


def test_a_bad_row_fails_the_job_and_names_its_line(renderer: ChatRenderer) -> None:
    with pytest.raises(TrainingFailedError, match="Line 2, messages") as caught:
        build(renderer, row(), UNRENDERABLE, row())
    assert (caught.value.code, caught.value.param) == ("invalid_file_format", "training_file")


def test_all_faults_are_found_in_one_pass(renderer: ChatRenderer) -> None:
    bad = [UNRENDERABLE] * 60
    with pytest.raises(TrainingFailedError) as caught:
        build(renderer, row(), *bad)
    assert "Line 2" in caught.value.message
    assert "Line 51" in caught.value.message
    assert "Line 52" not in caught.value.message
    assert "(60 errors in all.)" in caught.value.message


def test_bad_rows_can_be_skipped_and_are_counted(renderer: ChatRenderer) -> None:
    dataset = build(renderer, UNRENDERABLE, row(), UNRENDERABLE, on_error="skip")
    assert [example.line for example in dataset.examples] == [2]
    assert dataset.counts.warning("training file") == (
        "Of 3 rows of the training file, 2 rows were skipped because of errors."
    )


def test_a_row_that_trains_nothing_is_an_error(renderer: ChatRenderer) -> None:
    with pytest.raises(TrainingFailedError, match=r"Line 1.*weight"):
        build(renderer, row(weight=0))


def test_an_overlong_row_is_an_error_even_where_bad_rows_are_skipped(
    renderer: ChatRenderer,
) -> None:
    policies: tuple[Literal["fail", "skip"], ...] = ("fail", "skip")
    for on_error in policies:
        with pytest.raises(TrainingFailedError, match=r"Line 2: the row has \d+ tokens; 40 are"):
            build(renderer, row(), row(answer="word " * 90), on_error=on_error, max_length=40)


def test_overlong_rows_can_be_dropped(renderer: ChatRenderer) -> None:
    dataset = build(renderer, row(), row(answer="word " * 90), on_overlong="drop", max_length=40)
    assert [example.line for example in dataset.examples] == [1]
    assert (dataset.counts.n_dropped, dataset.counts.n_skipped) == (1, 0)


def test_truncation_keeps_the_start_of_the_answer(renderer: ChatRenderer) -> None:
    dataset = build(
        renderer, row(), row(answer="word " * 90), on_overlong="truncate", max_length=40
    )
    cut = dataset.examples[1]
    whole = renderer.render(ChatRow.model_validate(row(answer="word " * 90)))
    assert cut.input_ids.tolist() == whole.input_ids[:40]
    assert cut.n_trained == cut.trained.sum() > 0
    assert dataset.counts.n_truncated == 1
    assert "1 row was truncated" in (dataset.counts.warning("training file") or "")


def test_truncation_that_leaves_nothing_to_learn_is_an_error(renderer: ChatRenderer) -> None:
    with pytest.raises(TrainingFailedError, match=r"Line 1: cut from \d+ to 40 tokens, no trained"):
        build(renderer, row(question="word " * 90), on_overlong="truncate", max_length=40)


def test_a_row_of_exactly_the_limit_is_not_cut(renderer: ChatRenderer) -> None:
    n_ids = len(renderer.render(ChatRow.model_validate(row())).input_ids)
    dataset = build(renderer, row(), on_overlong="truncate", max_length=n_ids)
    assert dataset.counts.n_truncated == 0
    assert dataset.counts.warning("training file") is None


def test_a_file_without_a_usable_row_fails(renderer: ChatRenderer) -> None:
    with pytest.raises(TrainingFailedError, match="No row is left"):
        build(renderer, UNRENDERABLE, on_error="skip")


def test_every_row_comes_once_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 300, 103).tolist()
    batches = epoch_batches(lengths, 8, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(103))
    assert sorted(map(len, batches)) == [7] + [8] * 12


def test_the_order_follows_from_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 300, 100).tolist()
    order = epoch_batches(lengths, 8, seed=1, epoch=0)
    assert order == epoch_batches(lengths, 8, seed=1, epoch=0)
    others = [epoch_batches(lengths, 8, 1, epoch=1), epoch_batches(lengths, 8, 2, epoch=0)]
    sets = [{frozenset(batch) for batch in batches} for batches in (order, *others)]
    assert len(sets[0] & sets[1]) < 4
    assert len(sets[0] & sets[2]) < 4


def test_grouping_by_length_saves_most_of_the_padding() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 800).tolist()

    def padded(batches: list[list[int]]) -> float:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)

    in_file_order = [list(range(start, start + 8)) for start in range(0, 800, 8)]
    assert padded(epoch_batches(lengths, 8, 0, 0)) < 1.10 < 1.5 < padded(in_file_order)


@pytest.mark.parametrize("pads", [False, True])
def test_micro_batches_stay_within_the_budget_and_lose_nothing(pads: bool) -> None:
    examples = make_examples(30)
    groups = list(micro_batches(examples, 64, pads=pads))
    for group in groups:
        lengths = [len(example.input_ids) for example in group]
        assert (len(group) * max(lengths) if pads else sum(lengths)) <= 64
    assert sorted(e.line for group in groups for e in group) == list(range(1, 31))
    assert len(groups) < 15


def test_an_example_beyond_the_budget_stands_alone() -> None:
    examples = make_examples(4)
    assert [len(group) for group in micro_batches(examples, 1, pads=False)] == [1, 1, 1, 1]


def test_running_text_that_is_too_long_becomes_several_rows(renderer: ChatRenderer) -> None:
    text = " ".join(f"The gate at lock {number} is shut." for number in range(20))
    rendered = replace(renderer.render(TextRow(text=text)), frame=(0, 0), splits=True)
    sink: list[Example] = []
    policy = RowPolicy("fail", "error", 32)
    counts = build_dataset([(1, TextRow(text=text))], Framed(rendered), policy, PARAM, sink)
    assert counts.n_examples == len(sink) > 3
    assert [each.line for each in sink] == [1] * len(sink)
    ids = [int(token) for each in sink for token in each.input_ids]
    assert ids == rendered.input_ids
    assert max(len(each.input_ids) for each in sink) == 32
    assert counts.n_truncated == 0


def test_each_window_of_a_text_is_in_its_frame(renderer: ChatRenderer) -> None:
    rendered = Rendered(
        [1, *range(10, 20), 2], [False] + [True] * 10 + [False], frame=(1, 1), splits=True
    )
    sink: list[Example] = []
    build_dataset(
        [(1, TextRow(text="x"))], Framed(rendered), RowPolicy("fail", "error", 6), PARAM, sink
    )
    assert [each.input_ids.tolist() for each in sink] == [
        [1, 10, 11, 12, 13, 2],
        [1, 14, 15, 16, 17, 2],
        [1, 18, 19, 2],
    ]
    sink.clear()
    build_dataset(
        [(1, TextRow(text="x"))], Framed(rendered), RowPolicy("fail", "truncate", 6), PARAM, sink
    )
    assert [each.input_ids.tolist() for each in sink] == [[1, 10, 11, 12, 13, 2]]


def test_of_a_row_of_two_sequences_each_is_cut(renderer: ChatRenderer) -> None:
    pair = Rendered(
        [1, 2, 3, 4, 5, 1, 2, 9],
        [False, False, True, True, True, False, False, True],
        parts=(5, 3),
        weight=1,
    )
    sink: list[Example] = []
    build_dataset(
        [(1, TextRow(text="x"))], Framed(pair), RowPolicy("fail", "truncate", 4), PARAM, sink
    )
    (example,) = sink
    assert example.input_ids.tolist() == [1, 2, 3, 4, 1, 2, 9]
    assert (example.parts, example.n_trained) == ((4, 3), 1)
    with pytest.raises(TrainingFailedError, match="no trained token is left"):
        build_dataset(
            [(1, TextRow(text="x"))], Framed(pair), RowPolicy("fail", "truncate", 2), PARAM, []
        )


@dataclass
class Framed:
    """Renders every row as the same ids."""

    rendered: Rendered

    def render_all(self, rows: Sequence[Row]) -> list[Rendered | RowError]:
        return [self.rendered for _ in rows]
