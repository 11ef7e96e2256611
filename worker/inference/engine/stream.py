"""From tokens to text that is final: whole characters only, and never a part of a stop string."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_INCOMPLETE = "\ufffd"
_MAX_HELD = 16
"""Tokens that may wait for the rest of a character; a character has at most 4 bytes, so that what
waits longer is no character but bytes that never become one."""


class TextStream:
    """Turns the tokens of one sequence into pieces of text; the pieces joined are the whole text.

    Args:
        decode: Tokens to text, with U+FFFD where bytes are no complete character.
        stop: Strings that end the text and are no part of it.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []  # the window: from the boundary before the last one on
        self._boundary = 0  # how many tokens of the window end at a whole character
        self._sent = 0  # how many characters of the decoded window are out
        self._held = ""  # text that may be the beginning of a stop string
        self.n_out = 0
        """Characters that have been returned."""
        self.was_cut = False
        """Whether a stop string has ended the text."""

    @property
    def n_seen(self) -> int:
        """Characters of whole tokens so far: those returned and those held back."""
        return self.n_out + len(self._held)

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text that became final, and whether a stop string ended it."""
        self._tokens.append(token)
        return self._until_stop(self._new_text())

    def finish(self) -> str:
        """Return what was held back as a possible stop string; half a character is dropped."""
        text, self._held = self._held, ""
        self.n_out += len(text)
        return text

    def _new_text(self) -> str:
        text = self._decode(self._tokens)
        stable = text.rstrip(_INCOMPLETE)
        if stable != text and len(self._tokens) - self._boundary > _MAX_HELD:
            stable = text
        new = stable[self._sent :]
        self._sent += len(new)
        if stable == text:
            # Decoders look at neighbours (for spaces): the next window keeps a stretch as context.
            self._tokens = self._tokens[self._boundary :]
            self._boundary = len(self._tokens)
            self._sent = len(self._decode(self._tokens))
        return new

    def _until_stop(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held, self.was_cut = "", True
            self.n_out += min(found)
            return text[: min(found)], True
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        self.n_out += len(text) - kept
        return text[: len(text) - kept], False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
