"""Parquet and Arrow: columns of typed values, read a few hundred rows at a time.

A few bytes of Parquet can stand for terabytes, so what comes out is counted against what the file
takes on the disk (``containers.Budget``); the process that reads is limited in memory besides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.domain.reports import RowFinding
from worker.data.containers import Budget, Limits, UnreadableError
from worker.data.records import Fault, Record

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 256


def read_parquet(path: Path, limits: Limits) -> Iterator[Record | RowFinding]:
    """Yield a record for each row; the number of the row is its line."""
    import pyarrow.parquet as pq

    with _damage_told(), pq.ParquetFile(path, memory_map=False) as file:
        if file.metadata.num_rows > limits.max_rows:
            raise UnreadableError(
                Fault(
                    "too_many_rows", f"the file says that it has {file.metadata.num_rows:,} rows."
                )
            )
        yield from _rows(file.iter_batches(BATCH_ROWS), file.schema_arrow, path, limits)


def read_arrow(path: Path, limits: Limits, *, is_stream: bool) -> Iterator[Record | RowFinding]:
    """Yield a record for each row of an Arrow IPC file or stream."""
    import pyarrow as pa

    with _damage_told(), pa.OSFile(str(path)) as source:
        if is_stream:
            with pa.ipc.open_stream(source) as stream:
                yield from _rows(iter(stream), stream.schema, path, limits)
            return
        with pa.ipc.open_file(source) as file:
            batches = (file.get_batch(at) for at in range(file.num_record_batches))
            yield from _rows(batches, file.schema, path, limits)


def _rows(
    batches: "Iterator[pa.RecordBatch]", schema: "pa.Schema", path: Path, limits: Limits
) -> Iterator[Record | RowFinding]:
    budget = Budget(path, limits)
    names = [field.name for field in schema if _is_json_like(field.type)]
    for field in schema:
        if field.name not in names:
            yield Fault(
                "unsupported_column",
                f"column {field.name[:40]!r} is of type {str(field.type)[:40]} and is left out.",
                path=field.name[:60],
                hint="Store it as text or numbers if rows need it.",
                level="warning",
            ).finding(1)
    if not names:
        raise UnreadableError(
            Fault("unsupported_format", "no column of the file holds text or numbers.")
        )
    number = 0
    for batch in batches:
        budget.take(batch.nbytes)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            rows = batch.select(names).slice(start, BATCH_ROWS).to_pylist(maps_as_pydicts="strict")
            for row in rows:
                number += 1
                yield Record(number, None, None, row)


def _is_json_like(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json_like(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json_like(field.type) for field in kind)
    if types.is_map(kind):
        return types.is_string(kind.key_type) and _is_json_like(kind.item_type)
    if types.is_dictionary(kind):
        return _is_json_like(kind.value_type)
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_null(kind)
    )


@contextmanager
def _damage_told() -> Iterator[None]:
    """Turn what Arrow raises on a damaged file into a finding."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UnreadableError(
            Fault(
                "invalid_file",
                f"the file is damaged: {reason}",
                hint="Write it again, and compare its size after the upload.",
            )
        ) from error
