"""Rows of every form as token ids: what is learned of them, and what is refused."""

from pathlib import Path

import pytest

from models.domain.rows import ChatMessage, ChatRow, PreferenceRow, TextRow
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.encode.documents import DocumentRenderer
from worker.encode.pairs import PairRenderer
from worker.masker import Rendered
from worker.row_error import RowError


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
