"""What a job will take, before it runs: memory by part, time, disk.

Sizes follow from shapes. What does not (speed, activations, the process itself) is measured once
for each base model, precision and kind of device (`Probe`), and corrected by the jobs that ended
since (`Corrections`).
"""

from collections.abc import Sequence
from math import ceil
from statistics import median
from typing import Literal

from pydantic import Field

from models.domain.base import Frozen
from models.domain.training import Precision, TrainingSpec

NF4_BITS = {True: 4.127, False: 4.5}
"""Of a parameter, with and without double quantisation (arXiv 2305.14314, section 3)."""
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03}
"""What an optimizer keeps for a trained parameter; the others' is paged out, or next to nothing."""
PROBE_OPTIMIZER_BYTES = 8
"""AdamW's two moments of a parameter, in float32."""
CAST_BYTES = 2
"""Of an adapter's parameter in a pass: in the dtype of products, beside the one in float32."""
SAVED_BYTES = 8
"""Of the same while it is saved, on a CPU: two moments as the bytes that are written."""
SAVED_PER_SECOND = 100e6
"""Bytes of weights and moments that are copied, written, hashed and published; on two cores 70 to
140 MB were."""
MEMORY_BAND, TIME_BAND = 0.2, 0.3
"""How far a measured job may be from its estimate, as a share of it."""
LOW_RANK_COST = 1.5
"""Work of an adapter's parameter against a frozen one's: forward and both gradients, not two."""
VALIDATIONS_PER_EPOCH = 10
OVERHEAD_SECONDS = 3.0
"""Of a job before its first and after its last step, beside loading; until jobs have told."""


class LayerShape(Frozen):
    """Linear layers of one name: `count` weights of [outputs, inputs]."""

    outputs: int
    inputs: int
    count: int

    @property
    def n_parameters(self) -> int:
        return self.outputs * self.inputs * self.count


Family = Literal["decoder", "encoder", "encoder_decoder"]


class BaseShape(Frozen):
    """A base model in numbers: its linear layers by the last part of their names, and the rest.

    `family` tells which objectives it can be trained with.
    `width` is that of the residual stream; `n_norms` counts the parameters of norms of that width
    inside of blocks, `n_biases` all biases. Both are part of `n_other`.
    """

    layers: dict[str, LayerShape]
    n_other: int
    family: Family = "decoder"
    n_blocks: int = 0
    width: int = 0
    n_norms: int = 0
    n_biases: int = 0

    @property
    def n_linear(self) -> int:
        return sum(layer.n_parameters for layer in self.layers.values())

    def weight_bytes(self, precision: Precision) -> int:
        """Return what the frozen weights take; only linear layers are in 4 or 8 bits."""
        if precision.type == "nf4":
            return int(self.n_linear * NF4_BITS[precision.double_quant] / 8 + 2 * self.n_other)
        if precision.type == "int8":
            return self.n_linear + 2 * self.n_other
        each = 4 if precision.type == "fp32" else 2
        return each * (self.n_linear + self.n_other)


class Probe(Frozen):
    """Measurements of one base model in one precision on one kind of device.

    Seconds are those of forward and backward passes: for each micro-batch, token, squared length
    of a row, and trained token; `update_seconds` is the optimizer's step. They were taken with
    an adapter of `n_adapter` parameters, which is in `fixed_bytes` with its gradients and moments.
    `forward_share` is the part of a pass without gradients. `token_bytes` is what a token of a
    micro-batch adds to the peak, `square_bytes` what the square of a row's length adds,
    `token_budget` the most tokens of a micro-batch.
    """

    device: str
    n_adapter: int
    token_budget: int
    fixed_bytes: int
    token_bytes: float
    square_bytes: float
    batch_seconds: float
    token_seconds: float
    square_seconds: float
    trained_seconds: float
    update_seconds: float
    forward_share: float
    start_seconds: float


class RowLengths(Frozen):
    """Lengths of a data set's rows, in tokens: a sample in ascending order, and how many rows.

    `trained_share` is the share of the tokens that have a loss; `n_held_out` rows of the same
    lengths are validated on.
    """

    n_rows: int = Field(ge=1)
    n_held_out: int = 0
    sample: list[int] = Field(min_length=1)
    trained_share: float

    @property
    def mean(self) -> float:
        return sum(self.sample) / len(self.sample)

    @property
    def mean_square(self) -> float:
        return sum(each * each for each in self.sample) / len(self.sample)

    @property
    def n_tokens(self) -> int:
        return round(self.mean * self.n_rows)

    def largest(self, n_rows: int) -> int:
        """Return about how many tokens the `n_rows` longest rows have together."""
        share = min(1.0, n_rows / self.n_rows)
        n_sampled = max(1, round(share * len(self.sample)))
        longest = self.sample[-n_sampled:]
        return round(sum(longest) / len(longest) * min(n_rows, self.n_rows))


class Corrections(Frozen):
    """What jobs that ended have shown: measured against estimated, medians over `n_jobs`."""

    memory: float = 1.0
    time: float = 1.0
    overhead_seconds: float | None = None
    n_jobs: int = 0


class MemoryParts(Frozen):
    """Peak memory of the trainer by what it holds, in bytes."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        return sum(self.model_dump().values())


class Band(Frozen):
    """The range that a measured value is expected in."""

    low: float
    high: float


class Estimate(Frozen):
    """What a job is expected to take. Times in seconds, sizes in bytes.

    `seconds` counts from the moment a worker takes the job to the end; queueing is not in it.
    """

    device: str
    n_rows: int
    tokens_per_epoch: int
    total_tokens: int
    total_steps: int
    trainable_parameters: int
    memory: MemoryParts
    peak_bytes: int
    peak_bytes_band: Band
    seconds: float
    seconds_band: Band
    train_seconds: float
    disk_bytes: int
    n_jobs_learned_from: int


def estimate(
    spec: TrainingSpec,
    shape: BaseShape,
    n_adapter: int,
    rows: RowLengths,
    probe: Probe,
    corrections: Corrections,
) -> Estimate:
    """Return what a job will take.

    Args:
        spec: Resolved.
        shape: Of the base model.
        n_adapter: Parameters that are trained.
        rows: Of the training data.
        probe: Of this base in this precision.
        corrections: From earlier jobs on the same.
    """
    numbers = spec.hyperparameters
    assert isinstance(numbers.batch_size, int)
    assert isinstance(numbers.n_epochs, int)
    assert isinstance(spec.checkpoint_steps, int)
    batch = min(numbers.batch_size, rows.n_rows)
    steps_per_epoch = ceil(rows.n_rows / batch)
    total_steps = steps_per_epoch * numbers.n_epochs
    memory = _memory(spec, shape, n_adapter, rows, probe, corrections.memory)
    growth = 1 + LOW_RANK_COST * (n_adapter - probe.n_adapter) / max(1, shape.n_linear)
    passes = _pass_seconds(probe, rows, batch, growth)
    step_seconds = passes + probe.update_seconds * n_adapter / max(1, probe.n_adapter)
    n_validated = rows.n_held_out * (numbers.n_epochs + 1) + (
        min(batch, rows.n_held_out) * min(steps_per_epoch, VALIDATIONS_PER_EPOCH) * numbers.n_epochs
    )
    validation = probe.forward_share * passes * n_validated / batch
    saved_bytes = (4 + PROBE_OPTIMIZER_BYTES) * n_adapter
    saving = ceil(total_steps / spec.checkpoint_steps) * saved_bytes / SAVED_PER_SECOND
    train_seconds = corrections.time * (total_steps * step_seconds + validation) + saving
    overhead = corrections.overhead_seconds
    if overhead is None:
        overhead = probe.start_seconds + OVERHEAD_SECONDS
    seconds = overhead + train_seconds
    peak = memory.total
    return Estimate(
        device=probe.device,
        n_rows=rows.n_rows,
        tokens_per_epoch=rows.n_tokens,
        total_tokens=rows.n_tokens * numbers.n_epochs,
        total_steps=total_steps,
        trainable_parameters=n_adapter,
        memory=memory,
        peak_bytes=peak,
        peak_bytes_band=_band(peak, MEMORY_BAND),
        seconds=seconds,
        seconds_band=_band(seconds, TIME_BAND),
        train_seconds=train_seconds,
        # Adapter and moments of the newest, the one before it, and the best; tokens as int32 + 1.
        disk_bytes=3 * saved_bytes + 5 * rows.n_tokens,
        n_jobs_learned_from=corrections.n_jobs,
    )


def _memory(
    spec: TrainingSpec,
    shape: BaseShape,
    n_adapter: int,
    rows: RowLengths,
    probe: Probe,
    correction: float,
) -> MemoryParts:
    assert isinstance(spec.hyperparameters.batch_size, int)
    longest = rows.sample[-1]
    largest = rows.largest(spec.hyperparameters.batch_size)
    tokens = max(longest, min(largest, probe.token_budget))
    weights = shape.weight_bytes(spec.precision)
    activations = round(probe.token_bytes * tokens + probe.square_bytes * tokens * longest)
    optimizer = round(OPTIMIZER_BYTES.get(spec.optimizer.type, 0.0) * n_adapter)
    # What a save takes comes on top: memory of activations is kept for the next step.
    adapter = 4 + CAST_BYTES + (SAVED_BYTES if probe.device.startswith("CPU") else 0)
    known = weights + (adapter + 4) * n_adapter + optimizer + activations
    in_probe = 4 + CAST_BYTES + 4 + PROBE_OPTIMIZER_BYTES
    process = probe.fixed_bytes - weights - in_probe * probe.n_adapter
    # What jobs took more or less than was reckoned is the heap's doing, so it is the process's.
    process = round((known + process) * correction) - known
    return MemoryParts(
        weights=weights,
        adapter=adapter * n_adapter,
        gradients=4 * n_adapter,
        optimizer=optimizer,
        activations=activations,
        process=process,
    )


def _pass_seconds(probe: Probe, rows: RowLengths, batch: int, growth: float) -> float:
    """Return the seconds of all forward and backward passes of a mean step."""
    tokens = batch * rows.mean
    return (
        probe.batch_seconds * max(1.0, tokens / probe.token_budget)
        + probe.token_seconds * tokens * growth
        + probe.square_seconds * batch * rows.mean_square
        + probe.trained_seconds * tokens * rows.trained_share
    )


def _band(value: float, share: float) -> Band:
    return Band(low=value * (1 - share), high=value * (1 + share))


def sample_of(lengths: Sequence[int], n: int = 257) -> list[int]:
    """Return `n` (or fewer) evenly spaced order statistics, the shortest and longest included."""
    ordered = sorted(lengths)
    if len(ordered) <= n:
        return ordered
    return [ordered[round(at * (len(ordered) - 1) / (n - 1))] for at in range(n)]


class Measured(Frozen):
    """What a job took, and what had been reckoned without corrections from the same probe."""

    device: str
    precision: str
    peak_bytes: int
    seconds: float
    train_seconds: float
    reckoned_peak_bytes: int | None = None
    reckoned_train_seconds: float | None = None


def corrections_from(jobs: Sequence[Measured]) -> Corrections:
    """Return the medians over jobs on one base model, precision and device."""
    judged = [job for job in jobs if job.reckoned_peak_bytes and job.reckoned_train_seconds]
    if not judged:
        return Corrections()
    # A few jobs say little: their ratio counts in part.
    trust = len(judged) / (len(judged) + 2)
    memory = median([job.peak_bytes / (job.reckoned_peak_bytes or 1) for job in judged])
    time = median([job.train_seconds / (job.reckoned_train_seconds or 1) for job in judged])
    return Corrections(
        memory=memory**trust,
        time=time**trust,
        overhead_seconds=median([job.seconds - job.train_seconds for job in judged]),
        n_jobs=len(judged),
    )
