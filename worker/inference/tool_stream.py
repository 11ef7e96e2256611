"""Tool calls out of an answer's text, while it is being written."""

import json
import re
import secrets
import string
from typing import Literal

from models.domain.generation import ToolCallDelta
from worker.tool_syntax import ToolSyntax, as_call

_ALPHABET = string.ascii_letters + string.digits
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters|args)"\s*:\s*(?=\{)'
)
_BETWEEN = " \t\r\n[,;"

State = Literal["text", "between", "head", "arguments", "tail", "over"]


class JsonEnd:
    """Follows JSON text, piece by piece, to the bracket that closes its first object or list."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """Return the index after the closing bracket, None where it is not in `text`."""
        for index, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return None


class ToolStream:
    """Splits the text of one choice into content and tool calls, as early as each is certain.

    What looks like the beginning of a call is held back; what turns out to be none is content,
    letter for letter. Without a marker in the template a call can only stand at the very start,
    and has to name a known tool.

    Args:
        syntax: How the model's template writes calls.
        names: The tools of the request.
        parallel: Whether there may be several calls; further ones are dropped if not.
    """

    def __init__(self, syntax: ToolSyntax, names: frozenset[str], *, parallel: bool = True) -> None:
        self.n_calls = 0
        self._marker, self._end_marker = syntax.marker, syntax.end_marker
        self._names = names
        self._parallel = parallel
        self._state: State = "text"
        self._buffer = ""
        self._taken = ""  # what was read of a call that is not certain yet
        self._at_start = True
        self._value = JsonEnd()
        self._n_scanned = 0
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []

    def push(self, text: str) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """Return the content and the parts of calls that `text` makes certain."""
        self._buffer += text
        while self._step():
            pass
        return self._out()

    def finish(self) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """Return what is left at the end of the text."""
        if self._state in ("text", "between", "head"):
            rest = self._taken + self._buffer
            if rest.strip() or not self.n_calls:
                self._content.append(rest)
        self._state, self._buffer, self._taken = "over", "", ""
        return self._out()

    def _out(self) -> tuple[str, tuple[ToolCallDelta, ...]]:
        content, deltas = "".join(self._content), tuple(self._deltas)
        self._content, self._deltas = [], []
        return content, deltas

    def _step(self) -> bool:
        """Take one step; False when more text is needed."""
        match self._state:
            case "text":
                return self._bare() if self._at_start and not self._marker else self._text()
            case "between":
                return self._between()
            case "head":
                return self._head()
            case "arguments":
                return self._arguments()
            case "tail":
                return self._tail()
        self._buffer = ""
        return False

    def _bare(self) -> bool:
        start = self._buffer.lstrip()
        if not start:
            return False
        if start[0] in "{[":
            self._go("between", len(self._buffer) - len(start))
        else:
            self._at_start = False
        return True

    def _text(self) -> bool:
        at = self._buffer.find(self._marker) if self._marker else -1
        if at >= 0:
            before = self._buffer[:at]
            if before.strip():
                self._content.append(before.rstrip())
                before = before[len(before.rstrip()) :]
            self._taken, self._buffer = before, self._buffer[at:]
            self._go("between", len(self._marker))
            return True
        kept = self._buffer
        if self._marker:  # white space before a call is no content
            kept = kept[: len(kept) - _overlap(kept, self._marker)].rstrip()
        self._content.append(kept)
        self._buffer = self._buffer[len(kept) :]
        return False

    def _between(self) -> bool:
        rest = self._buffer.lstrip(_BETWEEN)
        if not rest or (self._end_marker.startswith(rest) and rest != self._end_marker):
            return False
        if self._end_marker and rest.startswith(self._end_marker):
            if self._taken:
                return self._give_up()
            self._buffer = rest[len(self._end_marker) :]
            self._state = "text"
        elif rest[0] == "{":
            self._go("head", len(self._buffer) - len(rest))
            self._value, self._n_scanned = JsonEnd(), 0
        elif rest[0] == "]" and not self._taken:
            self._buffer = rest[1:]
            if not self._end_marker:
                self._at_start, self._state = False, "text"
        else:
            return self._give_up()
        return True

    def _head(self) -> bool:
        if found := _HEAD.match(self._buffer):
            name = _string(found[1])
            if name is None or not self._may_be(name):
                return self._give_up()
            self._begin(name)
            self._buffer = self._buffer[found.end() :]
            self._state, self._value = "arguments", JsonEnd()
            return True
        end = self._value.find(self._buffer[self._n_scanned :])
        if end is None:
            self._n_scanned = len(self._buffer)
            broken = bool(self._end_marker) and self._end_marker in self._buffer
            return self._give_up() if broken else False
        end += self._n_scanned
        call = _parsed(self._buffer[:end])
        if call is None or not self._may_be(call[0]):
            return self._give_up()
        self._begin(call[0], call[1])
        self._buffer = self._buffer[end:]
        self._after_call()
        return True

    def _arguments(self) -> bool:
        end = self._value.find(self._buffer)
        piece = self._buffer if end is None else self._buffer[:end]
        if piece:
            self._deltas.append(ToolCallDelta(index=self.n_calls - 1, arguments=piece))
        self._buffer = self._buffer[len(piece) :]
        if end is None:
            return False
        self._state, self._value = "tail", JsonEnd(depth=1)
        return True

    def _tail(self) -> bool:
        end = self._value.find(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._after_call()
        return True

    def _may_be(self, name: str) -> bool:
        return bool(self._marker) or name in self._names

    def _begin(self, name: str, arguments: str = "") -> None:
        call_id = "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))
        self._deltas.append(
            ToolCallDelta(index=self.n_calls, id=call_id, name=name, arguments=arguments)
        )
        self.n_calls += 1
        self._taken = ""

    def _after_call(self) -> None:
        self._state = "between" if self._parallel else "over"

    def _go(self, state: State, n: int) -> None:
        """Move `n` characters of the buffer to what is not certain, and change the state."""
        self._taken += self._buffer[:n]
        self._buffer = self._buffer[n:]
        self._state = state

    def _give_up(self) -> bool:
        """What was read of a call is content."""
        end = self._buffer.find(self._end_marker) if self._end_marker else -1
        n = end + len(self._end_marker) if end >= 0 else 0
        self._content.append(self._taken + self._buffer[:n])
        self._buffer, self._taken = self._buffer[n:], ""
        self._at_start, self._state = False, "text"
        return True


def _parsed(text: str) -> tuple[str, str] | None:
    try:
        return as_call(json.loads(text))
    except ValueError:
        return None


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
