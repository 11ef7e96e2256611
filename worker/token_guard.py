"""Special tokens typed into content: kept apart from the template's own, and encoded as text.

A user who types ``<|im_end|>`` must not end a turn. Breaking the string up would change what the
user wrote, and encoding the content piece by piece would change the tokens around it. Instead:

1. in the content, each special token's name is replaced by a *mask*, a number nobody can guess;
2. the template runs, and writes its own special tokens by their names;
3. in its output, the names become *aliases* (numbers again) and the masks become names;
4. a copy of the tokenizer, in which every special token is called by its alias, encodes it: what
   the template wrote gets its id, and the names are ordinary text.

Text without such names is encoded by the tokenizer itself.

Masks and aliases are digits only, so that no ``trim``, ``lower`` or ``tojson`` of a template
changes them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, and the half-open span of its characters that each stands for.

    `words` numbers the words (of the tokenizer's pre-tokenizer) that they are part of.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    words: Sequence[int | None] = ()


class TokenGuard:
    """Finds, masks and encodes special tokens for one tokenizer.

    Args:
        tokenizer: Its special added tokens are guarded; added tokens that are not special (such as
            ``<think>``) may be written in content and keep their ids.
        secret: A string of digits that no content can contain, because nobody knows it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", secret: str) -> None:
        self._tokenizer = tokenizer
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                special[token.content] = token_id
        self._ids = frozenset(special.values())
        self._by_name = special
        self._masks = {name: f"{secret}1{special[name]:09d}" for name in special}
        self._aliases = {name: f"{secret}2{special[name]:09d}" for name in special}
        longest_first = sorted(special, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        swaps = {mask: name for name, mask in self._masks.items()} | self._aliases
        self._swaps = swaps
        self._swappable = re.compile("|".join([f"{secret}1[0-9]{{9}}", self._names.pattern]))

    def found_in(self, value: object) -> bool:
        """Return whether a string anywhere inside a JSON-like `value` names a special token."""
        if isinstance(value, str):
            return self._names.search(value) is not None
        if isinstance(value, dict):
            return any(self.found_in(key) or self.found_in(item) for key, item in value.items())
        return isinstance(value, list) and any(map(self.found_in, value))

    def mask(self, value: _Value) -> _Value:
        """Return a copy of a JSON-like `value` with every special token's name masked."""
        return self._mask(value)  # type: ignore[return-value]

    def _mask(self, value: object) -> object:
        if isinstance(value, str):
            return self._names.sub(lambda match: self._masks[match[0]], value)
        if isinstance(value, dict):
            return {self._mask(key): self._mask(item) for key, item in value.items()}
        return [self._mask(item) for item in value] if isinstance(value, list) else value

    def split(self, text: str) -> tuple[str | int, ...]:
        """Return `text` cut at special tokens, each of which is its id."""
        pieces: list[str | int] = []
        end = 0
        for match in self._names.finditer(text):
            pieces += [text[end : match.start()], self._by_name[match[0]]]
            end = match.end()
        return tuple(piece for piece in [*pieces, text[end:]] if piece != "")

    def swap(self, text: str) -> str:
        """Return a template's output over masked content as `encode` takes it (step 3)."""
        return self._swappable.sub(lambda match: self._swaps[match[0]], text)

    def encode(self, texts: Sequence[str], *, guarded: bool) -> list[Encoded]:
        """Encode texts as they are; `guarded` ones have been through `swap`."""
        tokenizer = self._renamed if guarded else self._plain
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [Encoded(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_texts(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode plain texts, with their words; special tokens named in them are text.

        The offsets of a text that names one are those of another text.
        """
        found: dict[int, Encoded] = {}
        for guarded in (False, True):
            chosen = {
                at: self.swap(self.mask(text)) if guarded else text
                for at, text in enumerate(texts)
                if self.found_in(text) is guarded
            }
            tokenizer = self._renamed if guarded and chosen else self._plain
            encodings = tokenizer.encode_batch(list(chosen.values()), add_special_tokens=False)
            for at, each in zip(chosen, encodings, strict=True):
                found[at] = Encoded(each.ids, each.offsets, each.word_ids)
        return [found[at] for at in range(len(texts))]

    def last_special(self, encoding: Encoded, start: int, end: int) -> int | None:
        """Return the index in `start` … `end` (half open) of the last special token, if any."""
        ids = encoding.ids
        return next(
            (index for index in range(end - 1, start - 1, -1) if ids[index] in self._ids), None
        )

    def is_written_out(self, token_id: int, text: str) -> bool:
        """Return whether `text` is the name (or alias) of this token, not a word unknown to it."""
        name = text.strip()
        return token_id in (self._by_name.get(name), self._by_alias.get(name))

    @cached_property
    def _by_alias(self) -> dict[str, int]:
        return {alias: self._by_name[name] for name, alias in self._aliases.items()}

    @cached_property
    def _plain(self) -> "Tokenizer":
        """The tokenizer without truncation and padding, which some files of models switch on."""
        from tokenizers import Tokenizer

        plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.no_truncation()
        plain.no_padding()
        return plain

    @cached_property
    def _renamed(self) -> "Tokenizer":
        """The tokenizer with its special tokens called by aliases; built at the first need."""
        from tokenizers import Tokenizer

        plan: dict[str, Any] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        plan["post_processor"] = plan["truncation"] = plan["padding"] = None
        for token in plan["added_tokens"]:
            token["content"] = self._aliases.get(token["content"], token["content"])
        model = plan["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._aliases.get(k, k): v for k, v in model["vocab"].items()}
        else:
            model["vocab"] = [[self._aliases.get(k, k), score] for k, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not self._makes_special(pair)]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._aliases.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(plan))

    def _makes_special(self, pair: list[str] | str) -> bool:
        """Return whether a BPE merge builds a special token's name, or goes on from one."""
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        return not self._aliases.keys().isdisjoint((left, right, left + right))
