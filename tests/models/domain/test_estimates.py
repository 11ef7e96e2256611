"""Estimates follow the shapes, the rows and what was measured."""

import pytest

from models.domain.estimates import (
    SAVED_PER_SECOND,
    BaseShape,
    Corrections,
    Estimate,
    LayerShape,
    Measured,
    Probe,
    RowLengths,
    corrections_from,
    estimate,
    sample_of,
)
from models.domain.training import Precision, TrainingSpec

SHAPE = BaseShape(layers={"q": LayerShape(outputs=64, inputs=64, count=100)}, n_other=10_000)
N_ADAPTER = 20_000
PROBE = Probe(
    device="CPU",
    n_adapter=N_ADAPTER,
    token_budget=1000,
    fixed_bytes=500_000_000,
    token_bytes=1_000_000,
    square_bytes=0.0,
    batch_seconds=0.1,
    token_seconds=1e-3,
    square_seconds=1e-6,
    trained_seconds=2e-3,
    update_seconds=0.05,
    forward_share=0.25,
    start_seconds=2.0,
)
SAVING = 2 * 12 * N_ADAPTER / SAVED_PER_SECOND
"""Seconds that weights and moments after each of two epochs take."""
ROWS = RowLengths(n_rows=80, sample=[100] * 80, trained_share=0.5)


def reckon(
    rows: RowLengths = ROWS,
    n_adapter: int = N_ADAPTER,
    corrections: Corrections = Corrections(),  # noqa: B008
    **changes: object,
) -> Estimate:
    fields = {
        "model": "m",
        "training_file": "f",
        "seed": 1,
        "objective": {},
        "peft": {},
        "hyperparameters": {"n_epochs": 2, "batch_size": 8},
    }
    spec = TrainingSpec.model_validate(fields | changes).resolved(rows.n_rows, 10**8)
    return estimate(spec, SHAPE, n_adapter, rows, PROBE, corrections)


def test_weights_take_what_their_precision_says() -> None:
    assert SHAPE.n_linear == 64 * 64 * 100
    assert SHAPE.weight_bytes(Precision(type="fp32")) == 4 * (409_600 + 10_000)
    assert SHAPE.weight_bytes(Precision(type="bf16")) == 2 * (409_600 + 10_000)
    packed = SHAPE.weight_bytes(Precision(type="nf4"))
    assert packed == int(409_600 * 4.127 / 8 + 20_000)
    assert packed < SHAPE.weight_bytes(Precision(type="nf4", double_quant=False))


def test_time_is_the_sum_of_its_measured_parts() -> None:
    found = reckon()
    # 8 rows of 100 tokens: one micro-batch, 800 tokens, 8 · 100² of square, 400 trained.
    step = 0.1 + 800 * 1e-3 + 80_000 * 1e-6 + 400 * 2e-3 + 0.05
    assert (found.total_steps, found.total_tokens) == (20, 16_000)
    assert found.train_seconds == pytest.approx(20 * step + SAVING)
    assert found.seconds == pytest.approx(20 * step + SAVING + 2.0 + 3.0)
    assert found.seconds_band.low < found.seconds < found.seconds_band.high


def test_validation_costs_forward_passes() -> None:
    held_out = ROWS.model_copy(update={"n_held_out": 8})
    step = 0.1 + 800 * 1e-3 + 80_000 * 1e-6 + 400 * 2e-3
    # The whole split before the start and after both epochs, a batch ten times in an epoch.
    extra = reckon(held_out).train_seconds - reckon().train_seconds
    assert extra == pytest.approx(0.25 * step * (3 + 20))


def test_memory_grows_with_the_tokens_of_a_micro_batch_and_no_further() -> None:
    sizes = [
        reckon(hyperparameters={"n_epochs": 2, "batch_size": batch}).memory.activations
        for batch in (1, 8, 40)
    ]
    assert sizes == [100_000_000, 800_000_000, 1_000_000_000]
    squared = PROBE.model_copy(update={"square_bytes": 10.0})
    spec = TrainingSpec.model_validate(
        {"model": "m", "training_file": "f", "seed": 1, "objective": {}, "peft": {}}
    ).resolved(80, 10**8)
    found = estimate(spec, SHAPE, N_ADAPTER, ROWS, squared, Corrections())
    assert found.memory.activations == 800_000_000 + 10 * 800 * 100
    long = RowLengths(n_rows=2, sample=[3000, 5000], trained_share=0.5)
    assert reckon(long).memory.activations == 5_000_000_000


def test_a_larger_adapter_takes_more_of_everything() -> None:
    small, large = reckon(), reckon(n_adapter=2 * N_ADAPTER)
    # Weights and gradients, two moments, a cast, and on a CPU what is being saved.
    assert large.peak_bytes - small.peak_bytes == (4 + 4 + 8 + 2 + 8) * N_ADAPTER
    assert large.train_seconds > small.train_seconds
    assert large.disk_bytes - small.disk_bytes == 3 * 12 * N_ADAPTER


def test_the_parts_of_memory_add_up_to_the_peak_with_and_without_corrections() -> None:
    plain, corrected = reckon(), reckon(corrections=Corrections(memory=1.5))
    assert plain.peak_bytes == plain.memory.total == 1_300_000_000 + 8 * N_ADAPTER
    assert corrected.peak_bytes == corrected.memory.total == 1.5 * plain.peak_bytes


def test_jobs_that_ended_correct_time_memory_and_overhead() -> None:
    def job(peak: int, seconds: float, train: float) -> Measured:
        return Measured(
            device="CPU",
            precision="nf4",
            peak_bytes=peak,
            seconds=seconds,
            train_seconds=train,
            reckoned_peak_bytes=100,
            reckoned_train_seconds=10.0,
        )

    unjudged = Measured(device="CPU", precision="nf4", peak_bytes=1, seconds=1.0, train_seconds=1.0)
    known = corrections_from([job(110, 25, 20), job(120, 24, 20), job(900, 16, 8), unjudged])
    trust = 3 / (3 + 2)
    assert known.memory == pytest.approx(1.2**trust)
    assert known.time == pytest.approx(2.0**trust)
    assert (known.overhead_seconds, known.n_jobs) == (5.0, 3)
    found = reckon(corrections=known)
    steps = reckon().train_seconds - SAVING
    assert found.train_seconds == pytest.approx(2.0**trust * steps + SAVING)
    assert found.seconds == pytest.approx(found.train_seconds + 5.0)
    assert found.n_jobs_learned_from == 3
    assert corrections_from([unjudged]) == Corrections()


def test_a_sample_keeps_the_ends_and_the_order() -> None:
    assert sample_of([3, 1, 2]) == [1, 2, 3]
    sample = sample_of(range(1000, 0, -1), 5)
    assert sample == [1, 251, 500, 750, 1000] or sample == [1, 251, 501, 750, 1000]


def test_the_longest_rows_are_found_in_the_sample() -> None:
    rows = RowLengths(n_rows=1000, sample=[10] * 90 + [100] * 10, trained_share=1.0)
    assert rows.largest(1) == 100
    assert rows.largest(100) == 100 * 100
    assert rows.largest(5000) == round(19.0 * 1000)
