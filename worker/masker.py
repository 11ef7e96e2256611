"""From a row's text to its ids and loss mask: every boundary is proved on the tokens themselves."""

from bisect import bisect_left
from dataclasses import dataclass, field

from worker.row_error import RowError
from worker.token_guard import Encoded, TokenGuard

MAX_TAIL = 256
MAX_TAILS = 4096
"""Bounds of what is remembered: pieces of prompts of so many characters, and so many of them."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as token ids; ``trained[i]`` says that ``input_ids[i]`` is a target of the loss.

    A row of several sequences has them one after another, `parts` being their lengths. `labels` are
    what is to be told of the row, as numbers: of each id if `per_token`. `weight` is the row's
    part in the mean loss where that is not its trained tokens, or the `share` of them that counts.
    `frame` says how many of the first and last ids stay around a row that is cut; if it `splits`,
    a row that is too long becomes several. `n_first` are the ids of the first of two texts in one
    sequence.
    """

    input_ids: list[int]
    trained: list[bool]
    parts: tuple[int, ...] = ()
    labels: tuple[float, ...] = ()
    per_token: bool = False
    weight: int | None = None
    share: float = 1.0
    frame: tuple[int, int] | None = None
    splits: bool = False
    n_first: int | None = None

    @property
    def n_trained(self) -> int:
        return self.weigh(sum(self.trained))

    def weigh(self, n_trained: int) -> int:
        """Return the row's part in the mean loss if so many of its ids are trained."""
        if self.weight is not None:
            return self.weight
        return (
            n_trained if self.share == 1 else min(n_trained, max(1, round(self.share * n_trained)))
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model writes: characters `start` … `end` (half open) of a row's text."""

    start: int
    end: int
    path: str


@dataclass(frozen=True, slots=True)
class PreparedText:
    """One row as text, ready to encode, with what is learned of it.

    `before` and `after` are ids around the text; `after` is learned as well.
    """

    text: str
    guarded: bool
    turns: list[Turn]
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


class Masker:
    """Encodes texts, and says which of their ids are learned.

    Args:
        guard: The special tokens of the tokenizer that encodes.
    """

    def __init__(self, guard: TokenGuard) -> None:
        self._guard = guard
        self._tails: dict[tuple[str, bool], list[int]] = {}

    def encode(self, text: str, *, guarded: bool) -> Encoded:
        [encoding] = self._guard.encode([text], guarded=guarded)
        return encoding

    def mask(self, text: PreparedText, encoding: Encoded, stop_ids: frozenset[int]) -> Rendered:
        """Return the ids of a row; `stop_ids` are the tokens that may end a turn.

        Raises:
            RowError: a turn has no first token of its own, or no last one that ends it.
        """
        ids = [*text.before, *encoding.ids, *text.after]
        trained = [False] * len(ids)
        for turn in text.turns:
            first = self._boundary(text, encoding, turn)
            if text.after:
                last = len(encoding.ids) + len(text.after)
            else:
                last = self._end_of_turn(text, encoding, turn, first, stop_ids)
            start, end = len(text.before) + first, len(text.before) + last
            trained[start:end] = [True] * (end - start)
        return Rendered(ids, trained)

    def _boundary(self, text: PreparedText, encoding: Encoded, turn: Turn) -> int:
        """Return the index of the first token of a turn: its prompt, encoded alone, ends there.

        Special tokens cut a text in pieces that are encoded each by itself, so only the piece that
        the turn begins in is compared.
        """
        offsets, ids = encoding.offsets, encoding.ids
        first = bisect_left(offsets, (turn.start,))
        before = self._guard.last_special(encoding, 0, first)
        while before is not None and not self._guard.is_written_out(
            ids[before], text.text[slice(*offsets[before])]
        ):
            before = self._guard.last_special(encoding, 0, before)
        since = before or 0
        start = 0 if before is None else offsets[before][0]
        if ids[since:first] != self._encode_tail(text.text[start : turn.start], text.guarded):
            raise RowError(
                "answer_merges_with_prompt",
                "the first characters of what is learned merge with the end of the prompt into "
                "one token.",
                path=turn.path if text.after else f"{turn.path}.content",
                hint="Remove white space at its start (of a completion: move the white space at "
                "the prompt's end there); if there is none, the template is at fault.",
            )
        return first

    def _end_of_turn(
        self,
        text: PreparedText,
        encoding: Encoded,
        turn: Turn,
        first: int,
        stop_ids: frozenset[int],
    ) -> int:
        """Return the index after the end-of-turn token of a turn whose first token is `first`."""
        offsets = encoding.offsets
        stop = bisect_left(offsets, (turn.end,))
        last = self._guard.last_special(encoding, first, stop)
        if last is None and stop < len(offsets) and offsets[stop][0] == turn.end:
            last = stop  # a template that marks the words, but not the token that ends them
        if (
            last is None
            or encoding.ids[last] not in stop_ids
            or text.text[offsets[last][1] : turn.end].strip()
        ):
            raise RowError(
                "no_end_of_turn",
                "the chat template does not close this turn with an end-of-turn token, so the "
                "model would never learn to stop.",
                path=turn.path,
                hint="Use a base model whose chat template ends assistant turns.",
            )
        return last + 1

    def _encode_tail(self, text: str, guarded: bool) -> list[int]:
        """Return the ids of a prompt's last piece; the same few come back with every row."""
        key = (text, guarded)
        if key not in self._tails:
            ids = self.encode(text, guarded=guarded).ids
            if len(text) > MAX_TAIL or len(self._tails) >= MAX_TAILS:
                return ids
            self._tails[key] = ids
        return self._tails[key]
