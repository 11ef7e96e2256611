"""Rows of a data set as the base model of this server sees them."""

import itertools
import tempfile
from pathlib import Path
from threading import Lock

from models.domain.base import JsonObject
from models.domain.generation import PreviewRequest
from models.errors import NotFoundError
from models.storage import ObjectNotFoundError, ObjectStore, fetch_file
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.data.normalised import read_rows
from worker.data.preview import count_tokens, preview_row
from worker.encode.by_form import FormRenderer


class Previewer:
    """Renders rows of the object store, one request at a time, with a tokenizer of its own.

    Args:
        store: Where the usable rows of data sets are.
        directory: The base model's files.
    """

    def __init__(self, store: ObjectStore, directory: Path, base: BaseModelInfo) -> None:
        self._store = store
        self._base = base
        self._lock = Lock()
        self._tokenizer = load_tokenizer(directory)
        self._renderer = FormRenderer(ChatRenderer(self._tokenizer))

    def preview(self, request: PreviewRequest) -> JsonObject:
        """Return the rows that are asked for, and statistics of the first `n_counted`.

        Raises:
            NotFoundError: the rows are gone from the store.
        """
        max_length = min(request.max_length, self._base.max_length)
        with self._lock, tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.arrow"
            try:
                fetch_file(self._store, request.rows_key, path)
            except ObjectNotFoundError:
                raise NotFoundError(
                    "The rows of this file are gone from the object store.",
                    param="file_id",
                    code="file_not_found",
                ) from None
            end = request.offset + request.n_rows
            shown = [
                preview_row(line, row, self._renderer, self._tokenizer, max_length)
                for line, row in itertools.islice(read_rows(path), request.offset, end)
            ]
            counted = itertools.islice(read_rows(path), request.n_counted)
            statistics = count_tokens(counted, self._renderer, max_length)
        return {
            "max_length": max_length,
            "rows": [each.model_dump(mode="json") for each in shown],
            "statistics": statistics.model_dump(mode="json"),
        }
