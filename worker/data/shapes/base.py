"""What a shape is, and the checks of text that all shapes share."""

import difflib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from models.domain.base import JsonObject
from models.domain.rows import Row
from worker.data.records import Fault

_SPECIAL = (
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<<SYS>>|\[/?TOOL_CALLS\]"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
SPECIAL_TOKEN = re.compile(_SPECIAL)
SPECIAL_TOKEN_BYTES = re.compile(_SPECIAL.encode())
"""What chat templates write between turns, in the common families of models."""

_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
_TYPES = {str: "a string", list: "an array", dict: "an object", bool: "a boolean"}


@dataclass(frozen=True, slots=True)
class Column:
    """One of our fields and the names that it goes by; the first name is ours."""

    names: tuple[str, ...]
    required: bool = True

    @property
    def name(self) -> str:
        return self.names[0]


class BadRow(Exception):
    """A row that cannot be used."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Cells:
    """The values of a row under our names; faults are told under the file's.

    `names` has, by field, the names that a column may have which the first rows of the file lacked.
    """

    value: JsonObject
    columns: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]

    def path(self, field: str) -> str:
        known = self.columns.get(field)
        if known is not None:
            return known
        return next((name for name in self.names.get(field, ()) if name in self.value), field)

    def get(self, field: str) -> object:
        """Return a cell; raises `BadRow` if the row has none."""
        theirs = self.path(field)
        if theirs not in self.value:
            raise BadRow(missing(self.value, theirs))
        return self.value[theirs]

    def has(self, field: str) -> bool:
        return self.value.get(self.path(field)) is not None

    def text(self, field: str, *, may_be_blank: bool = False) -> str:
        """Return a cell that is text; a number or a boolean is none."""
        return self.checked(self.get(field), self.path(field), may_be_blank=may_be_blank)

    def checked(self, given: object, path: str, *, may_be_blank: bool = False) -> str:
        if not isinstance(given, str):
            raise BadRow(
                Fault("wrong_type", f"expected a string, got {type_name(given)}.", path=path)
            )
        if not may_be_blank and is_blank(given):
            hint = "Write it, or remove the row."
            raise BadRow(Fault("empty_content", "the text is empty.", path=path, hint=hint))
        return given


class Shape(ABC):
    """One way in which people write rows, and the form that the rows become."""

    name: ClassVar[str]
    form: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    def __init__(self) -> None:
        self._names = {column.name: column.names for column in self.columns}
        self._optional = {
            name for column in self.columns if not column.required for name in column.names
        }

    def fits(self, sample: list[JsonObject], columns: Mapping[str, str]) -> bool:
        """Whether rows with the right column names really have this shape."""
        return True

    def parse(self, value: JsonObject, columns: Mapping[str, str]) -> Row | Fault:
        """Return the row, or the first thing that is wrong with it.

        Args:
            value: The row as given.
            columns: Our field names to those of the file, for the columns that the file has.
        """
        try:
            return self.build(Cells(value, columns, self._names))
        except BadRow as bad:
            return bad.fault

    @abstractmethod
    def build(self, cells: "Cells") -> Row:
        """Return the row; raises `BadRow`."""

    def warnings(self, row: Row, value: JsonObject, columns: Mapping[str, str]) -> list[Fault]:
        """Return what is odd about a row that can be used."""
        return [
            *self.ignored_columns(value, columns),
            *special_token_warnings(self.texts(row, columns)),
        ]

    def texts(self, row: Row, columns: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        """Yield ``(path, text)`` for each text of a row."""
        for field, theirs in columns.items():
            text = getattr(row, field, None)
            if isinstance(text, str):
                yield theirs, text

    def ignored_columns(self, value: JsonObject, columns: Mapping[str, str]) -> list[Fault]:
        known = {*columns.values(), *self._optional}
        return [ignored_field(key, "") for key in value if key not in known]


def is_blank(text: str) -> bool:
    """Whether a text has nothing to read: white space and zero-width characters at most."""
    return not text.translate(_ZERO_WIDTH).strip()


def type_name(value: object) -> str:
    """Return what a JSON value is, with its article."""
    return "null" if value is None else _TYPES.get(type(value), "a number")


def quoted(value: object) -> str:
    """Return a value as JSON for a sentence, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"


def near_miss(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` is most likely a misspelling of."""
    near = difflib.get_close_matches(name[:60], list(known), n=1, cutoff=0.8)
    return near[0] if near else None


def ignored_field(key: str, path: str) -> Fault:
    return Fault(
        "ignored_field",
        f"the field {quoted(key)} is not used.",
        path=f"{path}.{key[:60]}".removeprefix("."),
        level="warning",
    )


def special_token_warnings(texts: Iterable[tuple[str, str]]) -> list[Fault]:
    """Return a warning for each text that spells a special token; it is trained as plain text."""
    return [
        Fault(
            "special_token_in_text",
            f"the text contains {quoted(found[0])}; it is trained as text, not as that token.",
            path=path,
            hint="Remove it if a chat template was already applied to this data.",
            level="warning",
        )
        for path, text in texts
        if (found := SPECIAL_TOKEN.search(text)) is not None
    ]


def missing(value: JsonObject, name: str) -> Fault:
    near = near_miss(name, value)
    hint = f"Did you mean {near!r}?" if near else f"Add {quoted(name)}."
    return Fault("missing_field", f"the field {name!r} is missing.", path=name, hint=hint)
