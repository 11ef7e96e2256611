"""Rows as Arrow tables: one schema for each form, exact in both directions.

JSON of unknown structure (tools, calls) is kept as text. ``line`` is the row's line in its file.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson

from models.domain.rows import (
    ROW_TYPES,
    ChatMessage,
    ChatRow,
    PreferenceRow,
    Row,
    TextPart,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from worker.data.fast_chat import FastMessage, FastRow


def to_batch(form: str, rows: "Sequence[Row | FastRow]", lines: Sequence[int]) -> "pa.RecordBatch":
    """Return rows of one form as a record batch, ``line`` first."""
    import pyarrow as pa

    columns: dict[str, Any] = {"line": pa.array(lines, pa.int64())}
    for name, field in _fields(form).items():
        values = [getattr(row, name) for row in rows]
        columns[name] = field.encode(values)
    return pa.record_batch(columns)


def from_batch(form: str, batch: "pa.RecordBatch") -> list[tuple[int, Row]]:
    """Return ``(line, row)`` for each row of a batch that `to_batch` made."""
    kind = ROW_TYPES[form]
    fields = _fields(form)
    values = [field.decode(batch.column(name)) for name, field in fields.items()]
    names = list(fields)
    lines = batch.column("line").to_pylist()
    return [
        (line, kind.model_construct(**dict(zip(names, cells, strict=True))))
        for line, *cells in zip(lines, *values, strict=True)
    ]


class _Field:
    """How one field is kept: as values of a plain Arrow type."""

    def __init__(self, make_type: Callable[[], "pa.DataType"]) -> None:
        self._make_type = make_type

    def encode(self, values: list[Any]) -> "pa.Array":
        import pyarrow as pa

        return pa.array(values, self._make_type())

    def decode(self, column: "pa.Array") -> list[Any]:
        values: list[Any] = column.to_pylist()
        return values


class _Json(_Field):
    """A value of any structure, as JSON text."""

    def __init__(self) -> None:
        super().__init__(_string)

    def encode(self, values: list[Any]) -> "pa.Array":
        return super().encode([None if each is None else orjson.dumps(each) for each in values])

    def decode(self, column: "pa.Array") -> list[Any]:
        return [None if each is None else orjson.loads(each) for each in column.to_pylist()]


class _Messages(_Field):
    """Lists of messages: a struct for each, flat arrays underneath."""

    def __init__(self) -> None:
        super().__init__(_string)

    def encode(self, values: list[Any]) -> "pa.Array":
        import pyarrow as pa

        offsets = [0]
        flat: list[ChatMessage | FastMessage] = []
        for messages in values:
            flat.extend(messages)
            offsets.append(len(flat))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _encode_messages(flat))

    def decode(self, column: "pa.Array") -> list[Any]:
        messages = _decode_messages(column.values)
        offsets = column.offsets.to_pylist()
        return [messages[start:end] for start, end in pairwise(offsets)]


class _Message(_Field):
    def __init__(self) -> None:
        super().__init__(_string)

    def encode(self, values: list[Any]) -> "pa.Array":
        return _encode_messages(values)

    def decode(self, column: "pa.Array") -> list[Any]:
        return _decode_messages(column)


def _encode_messages(messages: "list[ChatMessage | FastMessage]") -> "pa.StructArray":
    """Keep text as ``content`` and a list of text parts as ``parts``."""
    import pyarrow as pa

    string, small = pa.string(), pa.int8()
    contents = [message.content for message in messages]
    columns = {
        "role": pa.array([message.role for message in messages], string),
        "content": pa.array([c if isinstance(c, str) else None for c in contents], string),
        "parts": pa.array(
            [[part.text for part in c] if isinstance(c, list) else None for c in contents],
            pa.list_(string),
        ),
        "name": pa.array([message.name for message in messages], string),
        "weight": pa.array([message.weight for message in messages], small),
        "reasoning_content": pa.array([m.reasoning_content for m in messages], string),
        "tool_calls": _Json().encode([message.tool_calls for message in messages]),
        "tool_call_id": pa.array([message.tool_call_id for message in messages], string),
    }
    return pa.StructArray.from_arrays(list(columns.values()), list(columns))


def _decode_messages(column: "pa.StructArray") -> list[ChatMessage]:
    names = [column.type.field(at).name for at in range(column.type.num_fields)]
    values = [column.field(name).to_pylist() for name in names]
    return [_message(dict(zip(names, cells, strict=True))) for cells in zip(*values, strict=True)]


def _message(cells: dict[str, Any]) -> ChatMessage:
    parts = cells.pop("parts")
    if parts is not None:
        cells["content"] = [TextPart.model_construct(type="text", text=text) for text in parts]
    if cells["tool_calls"] is not None:
        cells["tool_calls"] = orjson.loads(cells["tool_calls"])
    return ChatMessage.model_construct(**cells)


def _string() -> "pa.DataType":
    import pyarrow as pa

    return pa.string()


def _strings() -> "pa.DataType":
    import pyarrow as pa

    return pa.list_(pa.string())


def _integer() -> "pa.DataType":
    import pyarrow as pa

    return pa.int32()


def _number() -> "pa.DataType":
    import pyarrow as pa

    return pa.float64()


def _boolean() -> "pa.DataType":
    import pyarrow as pa

    return pa.bool_()


_SPECIAL: dict[tuple[str, str], _Field] = {
    (ChatRow.form, "messages"): _Messages(),
    (ChatRow.form, "tools"): _Json(),
    (ChatRow.form, "parallel_tool_calls"): _Field(_boolean),
    (PreferenceRow.form, "messages"): _Messages(),
    (PreferenceRow.form, "tools"): _Json(),
    (PreferenceRow.form, "preferred"): _Message(),
    (PreferenceRow.form, "rejected"): _Message(),
    ("labelled", "labels"): _Field(_strings),
    ("pair", "score"): _Field(_number),
    ("choice", "choices"): _Field(_strings),
    ("choice", "answer"): _Field(_integer),
}
_TEXT = _Field(_string)


def _fields(form: str) -> dict[str, _Field]:
    return {name: _SPECIAL.get((form, name), _TEXT) for name in ROW_TYPES[form].model_fields}
