"""Output that follows a grammar: the mask of allowed tokens, by the library llguidance."""

import threading
from collections.abc import Iterable

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from worker.inference.engine.errors import EngineError, GenerationError


class GrammarError(EngineError):
    """A grammar cannot be followed: it is malformed, asks for too much, or is too large."""


class Vocabulary:
    """The tokens of one tokenizer as bytes; made at the first use, which takes a second or two.

    Args:
        tokenizer: A fast one; only read.
        stop_ids: The tokens that end an answer, allowed where a grammar may end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = sorted(stop_ids)
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def load(self) -> LLTokenizer:
        """Return the library's form of it; blocks, so not on a loop."""
        with self._lock:
            if self._made is None:
                if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                    raise GrammarError("The base model has no fast tokenizer.")
                self._made = from_tokenizer(self._tokenizer, eos_token=self._stop_ids or None)
            return self._made

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token; of a special token, its name."""
        tokens = self.load()
        return tokens.decode_bytes([token]) if token < tokens.vocab_size else b""

    def compile(self, grammar: str) -> "Grammar":
        """Check a grammar in the library's Lark dialect.

        Raises:
            GrammarError: it cannot be followed; the message says why.
        """
        tokens = self.load()
        source = LLMatcher.grammar_from_lark(grammar)
        is_error, problems = LLMatcher.validate_grammar_with_warnings(source, tokens)
        if is_error:
            raise GrammarError(_first_line(problems[0]))
        return Grammar(tokens, source, grammar)


class Grammar:
    """A checked grammar; calling it makes the constraint of one text (`params.Constraint`)."""

    def __init__(self, tokens: LLTokenizer, source: str, lark: str) -> None:
        self.lark = lark
        """As it was written, for an engine that follows it elsewhere."""
        self._first = LLMatcher(tokens, source, log_level=0)

    def __call__(self) -> "Matcher":
        return Matcher(self._first.deep_copy())


class Matcher:
    """How far one text has come in a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor:
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        return mask > 0

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = _first_line(self._matcher.get_error())
            raise GenerationError(f"The output format could not be followed: {problem}")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
