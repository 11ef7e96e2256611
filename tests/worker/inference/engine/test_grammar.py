"""Masks of allowed tokens: only what the grammar allows, and an end only where it is whole."""

import json
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.worker.inference.conftest import Tokenizers
from worker.inference.engine.errors import GenerationError
from worker.inference.engine.grammar import Grammar, GrammarError, Vocabulary
from worker.inference.engine.params import Sampling
from worker.inference.engine.sampler import Sampler

Compile = Callable[[object], Grammar]


@pytest.fixture(scope="module")
def vocabulary(tokenizers: Tokenizers) -> Vocabulary:
    tokenizer, renderer = tokenizers
    return Vocabulary(tokenizer, renderer.stop_ids)


@pytest.fixture
def tokenizer(tokenizers: Tokenizers) -> PreTrainedTokenizerBase:
    return tokenizers[0]


def schema(vocabulary: Vocabulary, value: object) -> Grammar:
    return vocabulary.compile(f"start: %json {json.dumps(value)}")


def test_random_logits_write_json_that_fulfils_the_schema(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    grammar = schema(
        vocabulary,
        {
            "type": "object",
            "properties": {
                "ok": {"type": "boolean"},
                "kind": {"enum": ["tide", "wind"]},
                "n": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["ok", "kind", "n"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_pattern": "[ ]{0,2}"},
        },
    )
    logits = torch.Generator().manual_seed(3)
    for seed in range(3):
        constraint = grammar()
        sampler = Sampler(Sampling(max_tokens=200, seed=seed), (), constraint)
        tokens: list[int] = []
        while not sampler.is_over:
            drawn = sampler.pick(torch.randn(len(tokenizer), generator=logits))
            sampler.advance(drawn.token)
            tokens.append(drawn.token)
            assert len(tokens) < 200
        value = json.loads(str(tokenizer.decode(tokens)))
        assert sorted(value) == ["kind", "n", "ok"]
        assert value["kind"] in ("tide", "wind")
        assert isinstance(value["ok"], bool)
        assert 0 <= value["n"] <= 99


def test_an_end_token_is_allowed_only_where_the_text_is_whole(
    vocabulary: Vocabulary, tokenizers: Tokenizers
) -> None:
    tokenizer, renderer = tokenizers
    constraint = schema(vocabulary, {"type": "integer"})()
    ends = sorted(renderer.stop_ids)
    assert not constraint.allowed()[ends].any()
    for token in tokenizer.encode("12", add_special_tokens=False):
        constraint.advance(token)
    assert constraint.allowed()[ends].all()
    assert not constraint.is_over


def test_each_text_has_a_state_of_its_own(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    grammar = vocabulary.compile('start: "yes" | "no"')
    first, second = grammar(), grammar()
    for token in tokenizer.encode("yes", add_special_tokens=False):
        first.advance(token)
    assert first.is_over
    assert not second.is_over
    assert second.allowed().any()


def test_a_token_that_was_not_allowed_is_an_error(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    constraint = vocabulary.compile('start: "yes"')()
    [token] = tokenizer.encode("q", add_special_tokens=False)
    with pytest.raises(GenerationError, match="could not be followed"):
        constraint.advance(token)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "string", "format": "tide"}, "tide"),
    ],
)
def test_a_schema_that_cannot_be_followed_says_why(
    vocabulary: Vocabulary, value: object, match: str
) -> None:
    with pytest.raises(GrammarError, match=match):
        schema(vocabulary, value)


def test_tokens_are_the_bytes_that_they_stand_for(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "日本 tide 🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(vocabulary.bytes_of, ids)) == text.encode()
    assert vocabulary.bytes_of(10**6) == b""
