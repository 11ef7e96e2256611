"""Rows of every form as token ids: what is learned of them, and what is refused."""

from pathlib import Path

import pytest

from models.domain.rows import (
    ChatMessage,
    ChatRow,
    ChoiceRow,
    LabelledRow,
    PairRow,
    PreferenceRow,
    Row,
    Seq2SeqRow,
    TextRow,
)
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.encode.by_form import FormRenderer
from worker.encode.choices import ChoiceRenderer
from worker.encode.documents import DocumentRenderer
from worker.encode.encoder import (
    EncoderRenderer,
    MaskableRenderer,
    SentencePairRenderer,
    SourceTargetRenderer,
    TaggedRenderer,
)
from worker.encode.pairs import PairRenderer
from worker.masker import Rendered
from worker.row_error import RowError
from worker.training.objectives.classification import Classification, ClassificationParams


@pytest.fixture(scope="module")
def chat(smollm2: tuple[Path, BaseModelInfo]) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(smollm2[0]))


def say(role: str, content: str) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content})


def learned(chat: ChatRenderer, row: Rendered) -> list[str]:
    """The trained text of each sequence of a row."""
    texts, start = [], 0
    for length in row.parts or (len(row.input_ids),):
        end = start + length
        kept = zip(row.input_ids[start:end], row.trained[start:end], strict=True)
        texts.append(str(chat.tokenizer.decode([token for token, yes in kept if yes])))
        start = end
    return texts


def test_a_pair_is_the_conversation_with_either_answer(chat: ChatRenderer) -> None:
    row = PreferenceRow(
        messages=[say("user", "Hi"), say("assistant", "Yes?"), say("user", "Is it deep?")],
        preferred=say("assistant", "Nine metres."),
        rejected=say("assistant", "No idea"),
    )
    [found] = PairRenderer(chat).render_all([row])
    assert isinstance(found, Rendered)
    assert learned(chat, found) == ["Nine metres.<|im_end|>", "No idea<|im_end|>"]
    assert found.n_trained == 1
    served = chat.prompt_ids(row.messages)
    first, second = found.input_ids[: found.parts[0]], found.input_ids[found.parts[0] :]
    assert first[: len(served)] == second[: len(served)] == served


def test_an_empty_answer_of_a_pair_is_refused(chat: ChatRenderer) -> None:
    row = PreferenceRow(
        messages=[say("user", "Hi")],
        preferred=say("assistant", "Hello"),
        rejected=say("assistant", " "),
    )
    [found] = PairRenderer(chat).render_all([row])
    assert isinstance(found, RowError)
    assert found.code == "empty_content"


def test_rows_without_a_pair_are_refused_one_by_one(chat: ChatRenderer) -> None:
    pair = PreferenceRow(
        messages=[say("user", "Hi")],
        preferred=say("assistant", "Hello"),
        rejected=say("assistant", "Go"),
    )
    chat_row = ChatRow(messages=[say("user", "Hi"), say("assistant", "Hello")])
    found = PairRenderer(chat).render_all([chat_row, pair])
    assert isinstance(found[0], RowError)
    assert isinstance(found[1], Rendered)


def test_running_text_is_learned_whole_and_may_be_cut(chat: ChatRenderer) -> None:
    [found] = DocumentRenderer(chat).render_all([TextRow(text="The tide turns twice a day.")])
    assert isinstance(found, Rendered)
    assert learned(chat, found) == ["The tide turns twice a day.<|im_end|>"]
    assert found.frame == (0, 0)


@pytest.fixture(scope="module")
def bert(minilm: tuple[Path, BaseModelInfo]) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(minilm[0]))


def rendered(renderer: EncoderRenderer, row: Row) -> Rendered:
    [found] = renderer.render_all([row])
    assert isinstance(found, Rendered), found
    return found


def test_choices_are_answers_to_the_question_the_right_one_first(chat: ChatRenderer) -> None:
    row = ChoiceRow(question="How deep?", choices=["One.", "Nine metres.", "Two."], answer=1)
    [found] = ChoiceRenderer(chat).render_all([row])
    assert isinstance(found, Rendered)
    assert learned(chat, found) == [
        "Nine metres.<|im_end|>",
        "One.<|im_end|>",
        "Two.<|im_end|>",
    ]


def test_a_text_is_framed_as_the_tokenizer_frames_it(bert: ChatRenderer) -> None:
    found = rendered(MaskableRenderer(bert, 0.5, whole_words=False), TextRow(text="Hello, you?"))
    assert found.input_ids == bert.tokenizer("Hello, you?")["input_ids"]
    assert found.trained == [False, True, True, True, True, False]
    assert (found.frame, found.splits, found.n_trained) == ((1, 1), True, 2)


def test_a_frame_that_is_written_out_is_not_put_around_twice(bert: ChatRenderer) -> None:
    renderer = MaskableRenderer(bert, 0.15, whole_words=False)
    plain = rendered(renderer, TextRow(text="Hello, how are you?"))
    assert rendered(renderer, TextRow(text="[CLS] Hello, how are you? [SEP]")) == plain
    inner = rendered(renderer, TextRow(text="Hello [SEP] you"))
    assert inner.input_ids.count(bert.tokenizer.sep_token_id) == 1


def test_the_pieces_of_a_word_are_told(bert: ChatRenderer) -> None:
    found = rendered(MaskableRenderer(bert, 0.15, whole_words=True), TextRow(text="lockkeepers go"))
    assert found.labels[0] == found.labels[-1] == -1
    words = found.labels[1:-1]
    assert words[:-1] == (0.0,) * (len(words) - 1)
    assert words[-1] == 1.0
    assert len(words) > 2


def test_labels_become_numbers(bert: ChatRenderer) -> None:
    row = LabelledRow(text="It rains.", text_pair="It is wet.", labels=["yes"])
    params = ClassificationParams(labels=["no", "yes"])
    [found] = Classification().renderer(bert, params).render_all([row])
    assert isinstance(found, Rendered)
    both = bert.tokenizer("It rains.", "It is wet.")
    assert found.input_ids == both["input_ids"]
    assert found.n_first == both["token_type_ids"].index(1)
    assert (found.labels, found.n_trained) == ((1.0,), 1)


@pytest.mark.parametrize(
    ("row", "given", "numbers"),
    [
        (LabelledRow(text="x", labels=["a", "c"]), {"problem": "multi"}, (1.0, 0.0, 1.0)),
        (LabelledRow(text="x", labels=["2.5"]), {"problem": "regression"}, (2.5,)),
        (PairRow(first="x", second="y", score=0.3), {"problem": "regression"}, (0.3,)),
        (LabelledRow(text="x", labels=["a", "c"]), {}, "wrong_number_of_labels"),
        (LabelledRow(text="x", labels=["d"]), {}, "unknown_label"),
        (LabelledRow(text="x", labels=["d"]), {"problem": "regression"}, "wrong_type"),
        (PairRow(first="x", second="y"), {"problem": "regression"}, "missing_field"),
        (TextRow(text="x"), {}, "unsupported_form"),
    ],
)
def test_every_problem_has_its_labels(
    bert: ChatRenderer, row: Row, given: dict[str, str], numbers: object
) -> None:
    params = ClassificationParams.model_validate({"labels": ["a", "b", "c"], **given})
    [found] = Classification().renderer(bert, params).render_all([row])
    assert numbers == (found.code if isinstance(found, RowError) else found.labels)


def test_the_first_token_of_each_word_is_tagged(bert: ChatRenderer) -> None:
    renderer = TaggedRenderer(bert, ["O", "THING"])
    found = rendered(renderer, LabelledRow(text="a lockkeeper", labels=["O", "THING"]))
    assert found.input_ids == bert.tokenizer("a lockkeeper")["input_ids"]
    assert found.labels[:3] == (-1.0, 0.0, 1.0)
    assert set(found.labels[3:]) == {-1.0}
    assert found.n_trained == 2
    [refused] = renderer.render_all([LabelledRow(text="a b", labels=["O"])])
    assert isinstance(refused, RowError)
    assert "2 words and 1 labels" in refused.message


def test_two_texts_are_two_sequences(bert: ChatRenderer) -> None:
    found = rendered(SourceTargetRenderer(bert), Seq2SeqRow(source="one two", target="three"))
    assert found.parts == (4, 3)
    assert found.trained == [False] * 4 + [True] * 3
    pair = rendered(SentencePairRenderer(bert), PairRow(first="a", second="b c", score=0.5))
    assert (pair.parts, pair.labels, pair.n_trained) == ((3, 4), (0.5,), 1)


@pytest.mark.parametrize(
    "row",
    [
        TextRow(text="The tide is high."),
        LabelledRow(text="The tide is high.", labels=["tide"]),
        PairRow(first="a", second="b"),
        Seq2SeqRow(source="a", target="b"),
    ],
)
def test_rows_can_be_shown_before_an_objective_is_chosen(bert: ChatRenderer, row: Row) -> None:
    found = FormRenderer(bert).render(row)
    assert found.input_ids[0] == bert.tokenizer.cls_token_id
    assert found.n_trained > 0


def test_pairs_and_choices_are_shown_as_conversations(chat: ChatRenderer) -> None:
    choice = ChoiceRow(question="How deep?", choices=["One.", "Two."], answer=1)
    assert learned(chat, FormRenderer(chat).render(choice)) == ["Two.<|im_end|>", "One.<|im_end|>"]
    with pytest.raises(RowError, match="no content"):
        FormRenderer(chat).render(
            ChatRow(messages=[ChatMessage(role="user"), say("assistant", "Hello")])
        )
