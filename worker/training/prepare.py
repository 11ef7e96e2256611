"""From the usable rows of a job's files to tokenised examples, built once and reused by later jobs.

The rows come normalised from the lint, the tokens go to the object store under a key that names
everything they depend on (``worker.data.tokens``). A validation split is carved here if asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import structlog

from models.domain.training import TrainingSpec
from models.errors import TrainingFailedError
from models.storage import ObjectNotFoundError, ObjectStore, fetch_file, put_file, token_key
from worker.chat import ChatRenderer
from worker.data import normalised, splits
from worker.data.tokens import TokenFile, TokenKey
from worker.training import objectives
from worker.training.batches import RowCounts, RowPolicy
from worker.training.objectives.base import Example
from worker.training.tokenise import (
    CHILD_FROM_BYTES,
    TokeniseOrder,
    tokenise,
    tokenise_in_child,
)

log = structlog.get_logger(__name__)

Param = Literal["training_file", "validation_file"]
N_SHARED_SHOWN = 5


@dataclass(frozen=True, slots=True)
class DataFile:
    """One linted file of a job: where its usable rows are, how many were not, and their form.

    `labels` are those of its rows, in order of their names; None if there are too many.
    """

    file_id: str
    param: Param
    normalised_key: str
    data_sha256: str
    n_faulty: int
    form: str
    labels: tuple[str, ...] | None = ()


@dataclass(frozen=True, slots=True)
class Tools:
    """What rows are turned into tokens with.

    `renderer` is that of the tokenizer in the directory `tokenizer`; `warn` gets sentences for the
    job's events.
    """

    store: ObjectStore
    scratch: Path
    tokenizer: Path
    renderer: ChatRenderer
    tokenizer_sha256: str
    warn: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one file that are trained on, or that are held out."""

    file: DataFile
    name: Literal["all", "train", "validation"]

    def describe(self) -> str:
        what = self.file.param.replace("_", " ")
        return {"all": what, "train": what, "validation": f"validation split of the {what}"}[
            self.name
        ]


def load_examples(
    train: DataFile,
    valid: DataFile | None,
    spec: TrainingSpec,
    max_length: int,
    tools: Tools,
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the examples to train on and those to validate on (perhaps none).

    Args:
        max_length: Most tokens of a row, the base model's own limit included.

    Raises:
        TrainingFailedError: a row cannot be rendered or is too long and the policy is to fail, a
            file is gone, or no row is left (`param` names the file).
    """
    policy = RowPolicy(spec.on_error, spec.on_overlong, max_length)
    loader = _Loader(spec, policy, tools)
    if valid is not None:
        loader.warn_of_leakage(train, valid)
        return loader.load(_Part(train, "all")), loader.load(_Part(valid, "all"))
    if spec.validation_split:
        return loader.load(_Part(train, "train")), loader.load(_Part(train, "validation"))
    return loader.load(_Part(train, "all")), []


class _Loader:
    def __init__(self, spec: TrainingSpec, policy: RowPolicy, tools: Tools) -> None:
        self._spec = spec
        self._policy = policy
        self._tools = tools
        self._objective, self._params = objectives.resolve(spec.objective)

    def load(self, part: _Part) -> TokenFile:
        key = self._key(part)
        path = self._tools.scratch / f"tokens-{part.file.param}-{part.name}.arrow"
        try:
            fetch_file(self._tools.store, key, path)
        except ObjectNotFoundError:
            self._build(part, path)
            put_file(self._tools.store, key, path)
        file = TokenFile(path)
        counts = RowCounts(**file.notes)
        counts.n_skipped += part.file.n_faulty if part.name != "validation" else 0
        warning = counts.warning(part.describe())
        if warning is not None:
            self._tools.warn(warning)
        return file

    def _key(self, part: _Part) -> str:
        is_split = part.name != "all"
        key = TokenKey(
            data_sha256=part.file.data_sha256,
            tokenizer_sha256=self._tools.tokenizer_sha256,
            template_sha256=self._tools.renderer.template_sha256,
            max_length=self._policy.max_length,
            on_error=self._policy.on_error,
            on_overlong=self._policy.on_overlong,
            part=part.name,
            split=self._spec.validation_split if is_split else 0.0,
            seed=self._spec.seed if is_split else 0,
            encoding=self._objective.encoding(self._params),
        )
        return token_key(key.data_sha256, key.digest())

    def _build(self, part: _Part, path: Path) -> None:
        rows = self._normalised(part.file)
        order = TokeniseOrder(
            rows=rows,
            tokens=path,
            policy=self._policy,
            param=part.file.param,
            chosen=self._chosen(part, rows),
            objective=self._spec.objective,
        )
        if rows.stat().st_size < CHILD_FROM_BYTES:
            tokenise(order, self._tools.renderer)
        else:
            tokenise_in_child(order, self._tools.tokenizer)

    def _chosen(self, part: _Part, rows: Path) -> Path | None:
        """Return a file that says which rows are in this part of a split; None: all."""
        if part.name == "all":
            return None
        _, likenesses = normalised.read_likenesses(rows)
        mask = splits.held_out(likenesses, self._spec.validation_split, self._spec.seed)
        path = self._tools.scratch / f"chosen-{part.file.param}-{part.name}.npy"
        np.save(path, ~mask if part.name == "train" else mask)
        return path

    def warn_of_leakage(self, train: DataFile, valid: DataFile) -> None:
        """Say which validation rows are also trained on: their loss shows memory, not learning."""
        shared = normalised.shared_lines(self._normalised(train), self._normalised(valid))
        if shared:
            shown = ", ".join(
                f"line {line} = line {training_line}"
                for line, training_line in shared[:N_SHARED_SHOWN]
            )
            n_more = len(shared) - N_SHARED_SHOWN
            more = f" and {n_more:,} more" if n_more > 0 else ""
            self._tools.warn(
                f"{len(shared):,} rows of the validation file are in the training file as well "
                f"({shown}{more}); the validation loss will look better than it is."
            )

    def _normalised(self, file: DataFile) -> Path:
        path = self._tools.scratch / f"rows-{file.param}.arrow"
        if not path.exists():
            try:
                fetch_file(self._tools.store, file.normalised_key, path)
            except ObjectNotFoundError as error:
                raise file_gone(file.file_id, file.param) from error
        return path


def file_gone(file_id: str, param: Param) -> TrainingFailedError:
    return TrainingFailedError(f"File {file_id} was deleted.", param=param, code="file_not_found")
