"""The usable rows of a data set as one Arrow file: written by the lint, read by training.

Columns are those of the row's form (``forms``) plus ``likeness`` (``duplicates.likeness``), by
which the rows of two files are compared. The digest covers the rows' content and not the file: it
stays the same whatever format, spacing, compression or version of Arrow they came through.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import orjson
from pydantic import BaseModel

from models.domain.rows import Row
from worker.data import fast_chat, forms
from worker.data.fast_chat import FastRow

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 2048
_LIKENESS = "likeness"
_FORM = b"form"


def canonical(row: Row | FastRow) -> bytes:
    """Return the one JSON text of a row's content: sorted keys, nothing that is absent."""
    if isinstance(row, FastRow):
        return fast_chat.canonical(row)
    return orjson.dumps(row, default=_present_fields, option=orjson.OPT_SORT_KEYS)


def _present_fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, BaseModel):
        raise TypeError(f"{type(value).__name__} is not part of a row")
    return {name: field for name, field in value.__dict__.items() if field is not None}


class NormalisedWriter:
    """Writes rows of one form; a context manager.

    Args:
        path: The file to write; None writes nothing.
        form: What all rows are, e.g. ``chat``.
    """

    def __init__(self, path: Path | None, form: str) -> None:
        self._path = path
        self._form = form
        self._digest = hashlib.sha256(form.encode() + b"\n")
        self._rows: list[Row | FastRow] = []
        self._lines: list[int] = []
        self._likenesses: list[int] = []
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def add(self, line: int, row: Row | FastRow, likeness: int) -> None:
        self._digest.update(canonical(row) + b"\n")
        if self._path is None:
            return
        self._rows.append(row)
        self._lines.append(line)
        self._likenesses.append(likeness)
        if len(self._rows) == BATCH_ROWS:
            self._flush()

    @property
    def data_sha256(self) -> str:
        """The digest of the rows added so far."""
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if self._path is None:
            return
        import pyarrow as pa

        batch = forms.to_batch(self._form, self._rows, self._lines)
        batch = batch.append_column(_LIKENESS, pa.array(self._likenesses, pa.uint64()))
        batch = batch.replace_schema_metadata({_FORM: self._form})
        if self._writer is None:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            self._writer = pa.ipc.new_file(self._path, batch.schema, options=options)
        self._writer.write_batch(batch)
        self._rows, self._lines, self._likenesses = [], [], []


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield ``(line, row)`` for each row, holding one batch in memory."""
    for batch in _batches(path):
        form = batch.schema.metadata[_FORM].decode()
        yield from forms.from_batch(form, batch)


def read_likenesses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the lines, shape (rows,) int64, and their likenesses, shape (rows,) uint64."""
    lines, likenesses = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for batch in _batches(path):
        lines.append(batch.column("line").to_numpy())
        likenesses.append(batch.column(_LIKENESS).to_numpy())
    return np.concatenate(lines), np.concatenate(likenesses)


def _batches(path: Path) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    # Not mapped: pages of a mapped file count as memory of this process until they are taken away.
    with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def shared_lines(training: Path, validation: Path) -> list[tuple[int, int]]:
    """Return the rows of a validation file that the training file has as well.

    Each is ``(line in the validation file, first line in the training file)``.
    """
    train_lines, train = read_likenesses(training)
    valid_lines, valid = read_likenesses(validation)
    known, first = np.unique(train, return_index=True)
    if not len(known):
        return []
    places = np.minimum(np.searchsorted(known, valid), len(known) - 1)
    shared = np.flatnonzero(known[places] == valid)
    return [(int(valid_lines[at]), int(train_lines[first[places[at]]])) for at in shared]
