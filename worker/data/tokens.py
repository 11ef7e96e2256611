"""Tokenised rows on disk: written once, mapped into memory by every job that needs the same.

The key of such a file names everything that decides its content, the code included, so a cache can
be thrown away at any time and is never reused wrongly.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, overload

import numpy as np

from models.domain.base import Frozen, JsonObject
from worker.training.objectives.base import Example

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 1 << 20
_NOTES = b"tunery"
_CODE = (
    "models.domain.rows",
    "worker.chat",
    "worker.chat_template",
    "worker.encode.choices",
    "worker.encode.documents",
    "worker.encode.encoder",
    "worker.encode.pairs",
    "worker.masker",
    "worker.template_sandbox",
    "worker.token_guard",
    "worker.data.splits",
    "worker.data.tokens",
    "worker.training.batches",
)
"""Modules whose source decides what is in a file."""


class TokenKey(Frozen):
    """Everything that decides the tokens of a data set.

    `part` is ``all``, or ``train`` or ``validation`` of a split with `split` and `seed`; `encoding`
    is the objective's.
    """

    data_sha256: str
    tokenizer_sha256: str
    template_sha256: str
    max_length: int
    on_error: str
    on_overlong: str
    part: str = "all"
    split: float = 0.0
    seed: int = 0
    encoding: str = ""

    def digest(self) -> str:
        """Return the name of the file: sha256 over all fields and over the code."""
        whole = {**self.model_dump(), "code": code_sha256()}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@cache
def code_sha256() -> str:
    """Return the digest of our code and the versions of the libraries that turn text into ids."""
    digest = hashlib.sha256()
    for name in _CODE:
        file = import_module(name).__file__
        assert file is not None
        digest.update(Path(file).read_bytes())
    for library in ("transformers", "tokenizers", "jinja2"):
        digest.update(f"{library} {version(library)}\n".encode())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the digest of a tokenizer's vocabulary, merges, added tokens and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{whole}\n{special}".encode()).hexdigest()


class TokenWriter:
    """Writes examples one by one in flat memory; a context manager."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.notes: JsonObject = {}
        """Small facts that are kept with the file; set them before the end."""
        self._schema = pa.schema(
            {
                "line": pa.int64(),
                "input_ids": pa.large_list(pa.int32()),
                "trained": pa.large_list(pa.uint8()),
                "n_trained": pa.int64(),
                "parts": pa.list_(pa.int64()),
                "labels": pa.list_(pa.float64()),
                "n_first": pa.int64(),
            }
        )
        self._writer = pa.ipc.new_file(path, self._schema)
        self._examples: list[Example] = []
        self._n_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush({_NOTES: json.dumps(self.notes).encode()})
        self._writer.close()

    def append(self, example: Example) -> None:
        self._examples.append(example)
        self._n_tokens += len(example.input_ids)
        if self._n_tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self, notes: dict[bytes, bytes] | None = None) -> None:
        import pyarrow as pa

        lengths = [len(example.input_ids) for example in self._examples]
        offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int64))
        none = np.empty(0, np.int32)
        ids = np.concatenate([none, *(example.input_ids for example in self._examples)])
        trained = np.concatenate([none > 0, *(example.trained for example in self._examples)])
        columns = [
            pa.array([example.line for example in self._examples], pa.int64()),
            pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
            pa.LargeListArray.from_arrays(offsets, pa.array(trained.view(np.uint8))),
            pa.array([example.n_trained for example in self._examples], pa.int64()),
            pa.array([list(example.parts) for example in self._examples], pa.list_(pa.int64())),
            pa.array([example.labels for example in self._examples], pa.list_(pa.float64())),
            pa.array([example.n_first for example in self._examples], pa.int64()),
        ]
        self._writer.write_batch(
            pa.record_batch(columns, schema=self._schema), custom_metadata=notes
        )
        self._examples, self._n_tokens = [], 0


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One batch of the file as views of the mapped memory."""

    lines: np.ndarray
    offsets: np.ndarray
    input_ids: np.ndarray
    trained: np.ndarray
    n_trained: np.ndarray
    parts: "pa.ListArray"
    labels: "pa.ListArray"
    n_first: "pa.Int64Array"

    def parts_of(self, at: int) -> tuple[int, ...]:
        return tuple(self.parts[at].as_py())

    def labels_of(self, at: int) -> np.ndarray | None:
        found = self.labels[at].as_py()
        return None if found is None else np.array(found, np.float64)


class TokenFile(Sequence[Example]):
    """The examples of a file, mapped into memory: opening reads nothing but the index."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._source = pa.memory_map(str(path))
        reader = pa.ipc.open_file(self._source)
        self._chunks: list[_Chunk] = []
        self._starts = [0]
        self.notes: JsonObject = {}
        for index in range(reader.num_record_batches):
            batch, metadata = reader.get_batch_with_custom_metadata(index)
            if metadata is not None and _NOTES in metadata:
                self.notes = json.loads(metadata[_NOTES])
            self._chunks.append(
                _Chunk(
                    batch.column("line").to_numpy(),
                    batch.column("input_ids").offsets.to_numpy(),
                    batch.column("input_ids").values.to_numpy(),
                    batch.column("trained").values.to_numpy().view(np.bool_),
                    batch.column("n_trained").to_numpy(),
                    batch.column("parts"),
                    batch.column("labels"),
                    batch.column("n_first"),
                )
            )
            self._starts.append(self._starts[-1] + batch.num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self)
        number = bisect_right(self._starts, row) - 1
        chunk, at = self._chunks[number], row - self._starts[number]
        start, end = chunk.offsets[at], chunk.offsets[at + 1]
        return Example(
            line=int(chunk.lines[at]),
            input_ids=chunk.input_ids[start:end],
            trained=chunk.trained[start:end],
            n_trained=int(chunk.n_trained[at]),
            parts=chunk.parts_of(at),
            labels=chunk.labels_of(at),
            n_first=chunk.n_first[at].as_py(),
        )

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each example has, shape (examples,), int64; no example is read."""
        none = np.empty(0, np.int64)
        return np.concatenate([none, *(np.diff(chunk.offsets) for chunk in self._chunks)])
