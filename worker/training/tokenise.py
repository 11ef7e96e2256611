"""From normalised rows to a file of tokens; of large data sets in a process of its own.

``python -m worker.training.tokenise`` reads one order as JSON. It never loads torch, which
``transformers`` would import for its models and which takes 240 MiB that a tokenizer has no use
for; and what tokenising leaves in the heap goes back to the system before training starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from models.domain.base import Frozen, JsonObject
from models.domain.rows import Row
from models.errors import TrainingFailedError
from models.processes import die_with_parent
from models.settings import child_environment
from worker.base_models import load_tokenizer
from worker.chat import ChatRenderer
from worker.data import normalised
from worker.data.tokens import TokenWriter
from worker.training import objectives
from worker.training.batches import RowPolicy, build_dataset

CHILD_FROM_BYTES = 1 << 20
"""Files of rows (compressed) from this size on are worth the second that a process needs."""
_REFUSED = 3
_WITHHELD = ("TUNERY_DATABASE__URL", "TUNERY_BROKER__URL", "TUNERY_INFERENCE__TOKEN")


class TokeniseOrder(Frozen):
    """What to tokenise, how, and where to.

    `rows` is a file of `NormalisedWriter`; `chosen`, if given, an ``.npy`` file with a bool for
    each of its rows; `param` the request field that errors name; `objective` that of the job.
    """

    rows: Path
    tokens: Path
    policy: RowPolicy
    param: Literal["training_file", "validation_file"]
    chosen: Path | None = None
    objective: JsonObject = Field(default_factory=dict)


class _Message(Frozen):
    """An order together with the directory of the tokenizer."""

    order: TokeniseOrder
    tokenizer: Path


def tokenise(order: TokeniseOrder, renderer: ChatRenderer) -> None:
    """Write the tokens of the chosen rows; the file's notes are its `RowCounts`.

    Raises:
        TrainingFailedError: as `build_dataset`.
    """
    objective, params = objectives.resolve(order.objective)
    rows_renderer = objective.renderer(renderer, params)
    with TokenWriter(order.tokens) as writer:
        counts = build_dataset(_rows(order), rows_renderer, order.policy, order.param, writer)
        writer.notes = asdict(counts)


def _rows(order: TokeniseOrder) -> Iterator[tuple[int, Row]]:
    rows = normalised.read_rows(order.rows)
    return rows if order.chosen is None else compress(rows, np.load(order.chosen))


def tokenise_in_child(order: TokeniseOrder, tokenizer: Path) -> None:
    """Do as `tokenise` in a child process.

    Args:
        order: What to tokenise.
        tokenizer: Directory of the base model (``worker.base_models.load_tokenizer``).

    Raises:
        TrainingFailedError: as `tokenise`.
        RuntimeError: the child was killed or has a fault.
    """
    child = subprocess.run(
        [sys.executable, "-m", "worker.training.tokenise", str(os.getpid())],
        input=_Message(order=order, tokenizer=tokenizer).model_dump_json().encode(),
        stdout=subprocess.PIPE,
        env=child_environment({"TRANSFORMERS_VERBOSITY": "error"}, without=_WITHHELD),
        check=False,
    )
    if child.returncode == _REFUSED:
        refusal = json.loads(child.stdout)
        raise TrainingFailedError(refusal["message"], param=refusal["param"], code=refusal["code"])
    if child.returncode != 0:
        raise RuntimeError(f"Tokenising ended with exit status {child.returncode}.")


def main() -> int:
    """Be the child: read an order, obey it, and answer with the refusal if there is one."""
    die_with_parent(int(sys.argv[1]))
    # None in this place says that there is no such package; transformers then does without it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    message = _Message.model_validate_json(sys.stdin.buffer.read())
    try:
        tokenise(message.order, ChatRenderer(load_tokenizer(message.tokenizer)))
    except TrainingFailedError as error:
        sys.stdout.write(json.dumps(error.to_dict()))
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
