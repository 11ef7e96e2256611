"""The masker's boundaries against the definition: ids before an answer are those of its prompt."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models.domain.rows import ChatMessage, ChatRow
from worker.chat import ChatRenderer
from worker.row_error import RowError

END = "<end>"
SENTENCES = [
    "How deep is the harbour?\n\nFour  metres: \tsee the chart.",
    "水深は四メートルです。 🚤",
]
TEMPLATES = {
    "markers": "{% for m in messages %}<end>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<end>assistant\n{% endif %}",
    "plain prompts": "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "an open end": "{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}",
}


def byte_level() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    return bpe


def metaspace() -> Tokenizer:
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    unigram.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=[END, "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    unigram.train_from_iterator(SENTENCES * 20, trainer)
    return unigram


@pytest.fixture(params=[byte_level, metaspace], ids=lambda build: build.__name__, scope="module")
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    build: Callable[[], Tokenizer] = request.param
    return build()


@pytest.fixture(params=TEMPLATES.values(), ids=list(TEMPLATES), scope="module")
def renderer(request: pytest.FixtureRequest, backend: Tokenizer) -> ChatRenderer:
    names = {"unk_token": "<unk>"} if backend.token_to_id("<unk>") is not None else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, **names)
    tokenizer.chat_template = request.param
    return ChatRenderer(tokenizer)


texts = st.text(st.sampled_from("ab hdeF.:\n\t<>水🚤é"), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(texts, min_size=2, max_size=6).filter(lambda each: len(each) % 2 == 0))
def test_what_stands_before_an_answer_is_its_prompt_as_it_is_served(
    renderer: ChatRenderer, contents: list[str]
) -> None:
    roles = ("user", "assistant")
    messages = [
        ChatMessage(role=roles[index % 2], content=text) for index, text in enumerate(contents)
    ]
    try:
        rendered = renderer.render(ChatRow(messages=messages))
    except RowError as refused:
        assert refused.code in ("answer_merges_with_prompt", "empty_content")  # noqa: PT017
        return
    ids, trained = rendered.input_ids, rendered.trained
    starts = [at for at in range(1, len(ids)) if trained[at] and not trained[at - 1]]
    assert len(starts) == len(messages) // 2
    for number, start in enumerate(starts):
        assert ids[:start] == renderer.prompt_ids(messages[: 2 * number + 1])
    ends = [at for at in range(len(ids)) if trained[at] and not [*trained, False][at + 1]]
    assert {ids[at] for at in ends} <= renderer.stop_ids
