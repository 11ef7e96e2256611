"""From the rows of a data set to batches: rendering, policies for bad rows, order, micro-batches.

Everything here is a function of its arguments: the batches of an epoch follow from the examples,
the seed and the epoch, so that a resumed run sees what an uninterrupted one would have seen.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from typing import Literal, Protocol

import numpy as np

from models.domain.reports import MAX_FINDINGS, RowFinding, tell
from models.domain.rows import Row
from models.errors import TrainingFailedError
from worker.masker import Rendered
from worker.row_error import RowError
from worker.training.objectives.base import Example

CHUNK_ROWS = 256
"""So many rows are tokenised together, which uses all cores."""
POOL_BATCHES = 50
"""At most so many batches are sorted by length together; more would make every epoch alike."""


class Renderer(Protocol):
    """The part of ``worker.chat.ChatRenderer`` that is needed here."""

    def render_all(self, rows: Sequence[Row]) -> list[Rendered | RowError]: ...


@dataclass(frozen=True, slots=True)
class RowPolicy:
    """What happens to rows that cannot be used as they are; `max_length` in tokens."""

    on_error: Literal["fail", "skip"]
    on_overlong: Literal["error", "drop", "truncate"]
    max_length: int


class Sink(Protocol):
    """Where examples go: a list, or a file."""

    def append(self, example: Example, /) -> None: ...


@dataclass(slots=True)
class RowCounts:
    """What became of the rows of a data set."""

    n_examples: int = 0
    n_skipped: int = 0
    n_dropped: int = 0
    n_truncated: int = 0

    def warning(self, what: str) -> str | None:
        """Return a sentence about the rows that are not trained in full, or None."""
        parts = [
            f"{count} {'row was' if count == 1 else 'rows were'} {done}"
            for count, done in (
                (self.n_skipped, "skipped because of errors"),
                (self.n_dropped, "dropped because of their length"),
                (self.n_truncated, "truncated"),
            )
            if count
        ]
        if not parts:
            return None
        n_rows = self.n_examples + self.n_skipped + self.n_dropped
        return f"Of {n_rows} rows of the {what}, {', '.join(parts)}."


def build_dataset(
    rows: Iterable[tuple[int, Row]],
    renderer: Renderer,
    policy: RowPolicy,
    param: Literal["training_file", "validation_file"],
    sink: Sink,
) -> RowCounts:
    """Render every row into `sink`, in one pass that finds all faults.

    Args:
        rows: Line numbers and rows (``worker.data.normalised.read_rows``).
        param: Request field that names the file, for errors.

    Raises:
        TrainingFailedError: a row is at fault and the policy is to fail, or no row is left (code
            ``invalid_file_format``; the message has the first `MAX_FINDINGS` faults).
    """
    builder = _Builder(policy, sink)
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK_ROWS)):
        rendered = renderer.render_all([row for _, row in chunk])
        for (line, _), each in zip(chunk, rendered, strict=True):
            builder.add(line, each)
    what = param.replace("_", " ")
    if builder.n_faults:
        raise _format_error(what, param, tell(builder.faults, builder.n_faults))
    if not builder.counts.n_examples:
        reason = builder.counts.warning(what) or "It has no rows."
        raise _format_error(what, param, f"No row is left to train on. {reason}")
    return builder.counts


def _format_error(what: str, param: str, reason: str) -> TrainingFailedError:
    return TrainingFailedError(
        f"The job failed due to a file format error in the {what}. {reason}",
        param=param,
        code="invalid_file_format",
    )


class _Builder:
    """Sorts rendered rows into examples, rows left out, and faults."""

    def __init__(self, policy: RowPolicy, sink: Sink) -> None:
        self.counts = RowCounts()
        self.faults: list[RowFinding] = []
        self.n_faults = 0
        self._policy = policy
        self._sink = sink

    def add(self, line: int, rendered: Rendered | RowError) -> None:
        if isinstance(rendered, RowError):
            self._refuse(rendered.finding(line))
            return
        limit = self._policy.max_length
        n_ids = max(rendered.parts, default=len(rendered.input_ids))
        if n_ids > limit and rendered.splits and self._policy.on_overlong == "error":
            for window in _windows(rendered, rendered.frame or (0, 0), limit):
                self._keep(line, window)
        elif n_ids > limit and self._policy.on_overlong == "drop":
            self.counts.n_dropped += 1
        elif n_ids > limit and self._policy.on_overlong == "error":
            # Its own policy decides, so that "skip" never leaves out what "drop" was not asked to.
            self._fail(_overlong(line, n_ids, limit))
        else:
            self._keep(line, rendered)

    def _keep(self, line: int, rendered: Rendered) -> None:
        limit = self._policy.max_length
        cut = _cut(rendered, limit)
        input_ids = np.array(cut.input_ids, dtype=np.int32)
        trained = np.array(cut.trained, dtype=np.bool_)
        trained[:1] = False  # nothing predicts the first id
        n_trained = cut.weigh(int(trained.sum()))
        if n_trained == 0 or _lost_a_target(rendered, cut):
            self._refuse(_nothing_to_learn(line, len(rendered.input_ids), limit))
            return
        self.counts.n_truncated += len(rendered.input_ids) > len(cut.input_ids)
        self.counts.n_examples += 1
        labels = np.array(cut.labels, dtype=np.float64) if cut.labels else None
        self._sink.append(
            Example(line, input_ids, trained, n_trained, cut.parts, labels, cut.n_first)
        )

    def _refuse(self, finding: RowFinding) -> None:
        if self._policy.on_error == "skip":
            self.counts.n_skipped += 1
        else:
            self._fail(finding)

    def _fail(self, finding: RowFinding) -> None:
        self.n_faults += 1
        if len(self.faults) < MAX_FINDINGS:
            self.faults.append(finding)


def _spans(rendered: Rendered) -> list[tuple[int, int]]:
    """Return where each sequence of a row begins and ends."""
    ends = accumulate(rendered.parts or (len(rendered.input_ids),), initial=0)
    return list(pairwise(ends))


def _selected(rendered: Rendered, kept: Sequence[int], parts: tuple[int, ...]) -> Rendered:
    labels = rendered.labels
    return replace(
        rendered,
        input_ids=[rendered.input_ids[at] for at in kept],
        trained=[rendered.trained[at] for at in kept],
        labels=tuple(labels[at] for at in kept) if rendered.per_token else labels,
        parts=parts,
    )


def _cut(rendered: Rendered, limit: int) -> Rendered:
    """Return a row with at most `limit` ids in each sequence; a frame's last ids stay the last."""
    if max(rendered.parts, default=len(rendered.input_ids)) <= limit:
        return rendered
    _, n_last = rendered.frame or (0, 0)
    kept: list[int] = []
    parts = []
    for start, end in _spans(rendered):
        if end - start > limit:
            kept += [*range(start, start + limit - n_last), *range(end - n_last, end)]
        else:
            kept += range(start, end)
        parts.append(min(limit, end - start))
    return _selected(rendered, kept, tuple(parts) if rendered.parts else ())


def _lost_a_target(before: Rendered, after: Rendered) -> bool:
    """Tell whether a sequence that had trained ids has none left."""
    return before is not after and any(
        any(before.trained[slice(*one)]) and not any(after.trained[slice(*other)])
        for one, other in zip(_spans(before), _spans(after), strict=True)
    )


def _windows(rendered: Rendered, frame: tuple[int, int], limit: int) -> Iterator[Rendered]:
    """Cut a row that is too long into several, one after another, each in the row's frame."""
    first, last = frame
    n_ids = len(rendered.input_ids)
    step = max(1, limit - first - last)
    for start in range(first, n_ids - last, step):
        stop = min(start + step, n_ids - last)
        kept = [*range(first), *range(start, stop), *range(n_ids - last, n_ids)]
        if any(rendered.trained[at] for at in kept[1:]):
            yield _selected(rendered, kept, ())


def _overlong(line: int, n_ids: int, limit: int) -> RowFinding:
    return RowFinding(
        line=line,
        code="overlong_row",
        message=f"the row has {n_ids:,} tokens; {limit:,} are allowed.",
        hint='Shorten it, raise "max_seq_length" as far as the model allows, or set '
        '"on_overlong" to "drop" or "truncate".',
    )


def _nothing_to_learn(line: int, n_ids: int, limit: int) -> RowFinding:
    if n_ids <= limit:
        return RowFinding(line=line, code="nothing_to_learn", message="no token of it is trained.")
    return RowFinding(
        line=line,
        code="nothing_to_learn",
        message=f"cut from {n_ids:,} to {limit:,} tokens, no trained token is left.",
        hint='Shorten the messages before the answer, or set "on_overlong" to "drop".',
    )


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return the batches of one epoch as indices; every index appears once.

    Indices are shuffled, cut into pools of several batches, each pool is sorted by length (so that
    little is padding: specs, training, section 2) and the batches are shuffled again.
    """
    # A string as the seed goes through sha512: neighbouring seeds and epochs share nothing.
    generator = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    n_batches = -(-len(order) // batch_size)
    pool = batch_size * min(POOL_BATCHES, max(1, n_batches // 4))
    batches = []
    for start in range(0, len(order), pool):
        members = sorted(order[start : start + pool], key=lambda index: -lengths[index])
        batches += [members[at : at + batch_size] for at in range(0, len(members), batch_size)]
    generator.shuffle(batches)
    return batches


def micro_batches(
    examples: Sequence[Example], token_budget: int, *, pads: bool
) -> Iterator[list[Example]]:
    """Split the examples of one step, longest first, so that none holds more than `token_budget`.

    If `pads`, the budget counts padding as well. An example that alone exceeds it makes a batch of
    its own. Without padding the batches get about equal sizes.
    """
    group: list[Example] = []
    n_tokens = 0
    if examples and not pads:
        whole = sum(len(example.input_ids) for example in examples)
        n_groups = -(-whole // token_budget)
        longest = max(len(example.input_ids) for example in examples)
        token_budget = min(token_budget, whole // n_groups + longest // 2)
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        n_ids = len(group[0].input_ids) if pads and group else len(example.input_ids)
        if group and n_tokens + n_ids > token_budget:
            yield group
            group, n_tokens = [], 0
        group.append(example)
        n_tokens += n_ids
    if group:
        yield group
