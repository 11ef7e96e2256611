"""Rows as an encoder reads them: its special tokens around a text, or around two."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models.domain.rows import LabelledRow, PairRow, Row, Seq2SeqRow, TextRow
from worker.chat import ChatRenderer
from worker.masker import Rendered
from worker.row_error import RowError
from worker.token_guard import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens before, between and after texts, e.g. ``[CLS]``, ``[SEP]``, ``[SEP]``."""

    before: list[int]
    between: list[int]
    after: list[int]

    @classmethod
    def of(cls, chat: ChatRenderer) -> "Frame":
        """Find out what the tokenizer puts around one letter, and around two."""
        tokenizer = chat.tokenizer
        [letter] = [each.ids for each in chat.guard.encode_texts(["a"])]
        alone = list(tokenizer("a")["input_ids"])
        both = list(tokenizer("a", "a")["input_ids"])
        start = _find(alone, letter)
        before, after = alone[:start], alone[start + len(letter) :]
        end = len(both) - len(after) - len(letter)
        return cls(before, both[start + len(letter) : end], after)

    def around(self, text: Encoded, pair: Encoded | None = None) -> Rendered:
        """Return the row of a text, or of two; every id of them is trained, none of the frame."""
        ids, n_first = [*self.before, *text.ids], None
        trained = [False] * len(self.before) + [True] * len(text.ids)
        if pair is not None:
            ids += self.between
            trained += [False] * len(self.between)
            n_first = len(ids) if len(self.between) == 1 else len(ids) - len(self.between) // 2
            ids += pair.ids
            trained += [True] * len(pair.ids)
        return Rendered(
            [*ids, *self.after],
            trained + [False] * len(self.after),
            frame=(len(self.before), len(self.after)),
            n_first=n_first,
        )


def bare_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a text without the start and end tokens that somebody has written around it.

    The tokenizer's frame is put around it anyway; twice, it would be another text.
    """
    text = text.strip()
    if tokenizer.cls_token:
        text = text.removeprefix(tokenizer.cls_token)
    if tokenizer.sep_token:
        text = text.removesuffix(tokenizer.sep_token)
    return text.strip()


def _find(ids: list[int], part: list[int]) -> int:
    for start in range(len(ids) - len(part) + 1):
        if ids[start : start + len(part)] == part:
            return start
    raise ValueError("The tokenizer changes a text by what it puts around it.")


class EncoderRenderer(ABC):
    """Renders rows by a function of theirs that gets the texts of many encoded at once."""

    def __init__(self, chat: ChatRenderer) -> None:
        self._chat = chat
        self._frame = Frame.of(chat)

    def render_all(self, rows: Sequence[Row]) -> list[Rendered | RowError]:
        """Return the ids of each row, or why it has none."""
        texts = [self._texts(row) for row in rows]
        encoded = iter(self._chat.guard.encode_texts([text for each in texts for text in each]))
        return [
            self._render(row, [next(encoded) for _ in each])
            for row, each in zip(rows, texts, strict=True)
        ]

    def _texts(self, row: Row) -> list[str]:
        return texts_of(row)

    @abstractmethod
    def _render(self, row: Row, encoded: list[Encoded]) -> Rendered | RowError:
        """Put the texts of one row, encoded, into the model's frame."""


def texts_of(row: Row) -> list[str]:
    match row:
        case TextRow():
            return [row.text]
        case LabelledRow():
            return [row.text] if row.text_pair is None else [row.text, row.text_pair]
        case PairRow():
            return [row.first, row.second]
        case Seq2SeqRow():
            return [row.source, row.target]
    return []


def unsupported(row: Row) -> RowError:
    return RowError("unsupported_form", f"a {row.form} row cannot be used for this objective.")


class MaskableRenderer(EncoderRenderer):
    """Text of which a share is masked in training; of each id, the word that it is part of."""

    def __init__(self, chat: ChatRenderer, share: float, *, whole_words: bool) -> None:
        super().__init__(chat)
        self._share = share
        self._whole_words = whole_words

    def _texts(self, row: Row) -> list[str]:
        return [bare_text(text, self._chat.tokenizer) for text in texts_of(row)]

    def _render(self, row: Row, encoded: list[Encoded]) -> Rendered | RowError:
        if not isinstance(row, TextRow):
            return unsupported(row)
        [text] = encoded
        found = replace(self._frame.around(text), share=self._share, splits=True)
        if not self._whole_words:
            return found
        none = [-1.0]
        words = [-1.0 if word is None else float(word) for word in text.words]
        labels = none * len(self._frame.before) + words + none * len(self._frame.after)
        return replace(found, labels=tuple(labels), per_token=True)


class ClassRenderer(EncoderRenderer):
    """A text, or two, and numbers that the row is labelled with.

    Args:
        chat: Of the tokenizer.
        numbers: Makes the numbers of a row's labels; `RowError` where it cannot.
    """

    def __init__(
        self, chat: ChatRenderer, numbers: Callable[[Row], tuple[float, ...] | RowError]
    ) -> None:
        super().__init__(chat)
        self._numbers = numbers

    def _render(self, row: Row, encoded: list[Encoded]) -> Rendered | RowError:
        numbers = self._numbers(row)
        if isinstance(numbers, RowError):
            return numbers
        if not encoded:
            return unsupported(row)
        return replace(self._frame.around(*encoded), labels=numbers, weight=1)


class TaggedRenderer(EncoderRenderer):
    """Words separated by white space, each with its label; the first id of a word is trained."""

    def __init__(self, chat: ChatRenderer, labels: Sequence[str]) -> None:
        super().__init__(chat)
        self._labels = {label: float(at) for at, label in enumerate(labels)}

    def _texts(self, row: Row) -> list[str]:
        words = row.text.split() if isinstance(row, LabelledRow) else []
        return [word if at == 0 else f" {word}" for at, word in enumerate(words)]

    def _render(self, row: Row, encoded: list[Encoded]) -> Rendered | RowError:
        if not isinstance(row, LabelledRow) or row.text_pair is not None:
            return unsupported(row)
        if len(encoded) != len(row.labels):
            return RowError(
                "wrong_number_of_labels",
                f"the text has {len(encoded)} words and {len(row.labels)} labels.",
                path="labels",
                hint="Separate the words by spaces and give each a label.",
            )
        unknown = [label for label in row.labels if label not in self._labels]
        if unknown:
            return unknown_label(unknown[0])
        ids = list(self._frame.before)
        trained, labels = [False] * len(ids), [-1.0] * len(ids)
        for word, label in zip(encoded, row.labels, strict=True):
            n_first, n_more = len(word.ids[:1]), len(word.ids[1:])
            ids += word.ids
            trained += [True] * n_first + [False] * n_more
            labels += [self._labels[label]] * n_first + [-1.0] * n_more
        after = self._frame.after
        return Rendered(
            [*ids, *after],
            trained + [False] * len(after),
            labels=(*labels, *[-1.0] * len(after)),
            per_token=True,
            frame=(len(self._frame.before), len(after)),
        )


def unknown_label(label: str) -> RowError:
    return RowError(
        "unknown_label",
        f"label {label!r} is not among the labels of this job.",
        path="label",
        hint="Correct it, or name it in objective.labels.",
    )


class SourceTargetRenderer(EncoderRenderer):
    """A text and what it becomes: two sequences, of which the second is learned."""

    def _render(self, row: Row, encoded: list[Encoded]) -> Rendered | RowError:
        if not isinstance(row, Seq2SeqRow):
            return unsupported(row)
        source, target = (self._frame.around(each) for each in encoded)
        n_source, n_target = len(source.input_ids), len(target.input_ids)
        return Rendered(
            source.input_ids + target.input_ids,
            [False] * n_source + [True] * n_target,
            parts=(n_source, n_target),
            frame=(len(self._frame.before), len(self._frame.after)),
        )


class SentencePairRenderer(EncoderRenderer):
    """Two sentences as two sequences, and how alike they are (1 where nothing is said)."""

    def _render(self, row: Row, encoded: list[Encoded]) -> Rendered | RowError:
        if not isinstance(row, PairRow):
            return unsupported(row)
        first, second = (self._frame.around(each) for each in encoded)
        parts = (len(first.input_ids), len(second.input_ids))
        return Rendered(
            first.input_ids + second.input_ids,
            first.trained + second.trained,
            parts=parts,
            labels=(1.0 if row.score is None else row.score,),
            weight=1,
            frame=(len(self._frame.before), len(self._frame.after)),
        )
