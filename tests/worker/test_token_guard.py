"""The guard on tokenizers of other kinds: Unigram and BPE with a mark before the first word."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from worker.token_guard import TokenGuard

CORPUS = ["the tide is high at noon", "strike <s>this</s> out", "a boat leaves the harbour"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
SECRET = "7" * 30


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.mark.parametrize("build", [unigram, bpe])
def test_only_the_special_tokens_of_the_template_become_ids(build: Callable[[], Tokenizer]) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build(), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    guard = TokenGuard(tokenizer, SECRET)
    content = "strike <s>this</s> out"
    assert guard.found_in([{"content": content}])
    assert not guard.found_in([{"content": "the tide is high"}])
    text = guard.swap(f"<s>{guard.mask(content)}</s>")
    ids = guard.encode([text], guarded=True)[0].ids
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (ids[0], ids[-1]) == (begin, end)
    assert not {begin, end} & set(ids[1:-1])
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids[1:-1])]
    assert "".join(pieces).replace("▁", " ").strip() == content


@pytest.mark.parametrize("build", [unigram, bpe])
def test_ordinary_text_is_encoded_as_the_tokenizer_does(build: Callable[[], Tokenizer]) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build(), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for text in ("<s>the tide is high</s> at noon</s>", "a boat <s> leaves", "boat</s></s>"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        guard = TokenGuard(tokenizer, SECRET)
        for encoded in (
            guard.encode([text], guarded=False)[0],
            guard.encode([guard.swap(text)], guarded=True)[0],
        ):
            assert encoded.ids == expected


def test_masking_reaches_keys_and_nested_values_and_leaves_the_rest() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram(), eos_token="</s>")
    guard = TokenGuard(tokenizer, SECRET)
    value = {"a</s>": [1, None, {"b": "</s>"}], "c": "plain"}
    masked = guard.mask(value)
    assert "</s>" not in str(masked)
    assert masked["c"] == "plain"
    assert value["a</s>"], "the original is left alone"
