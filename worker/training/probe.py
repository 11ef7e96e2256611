"""Measure what training on one base model takes.

``python -m worker.training.probe BASE PRECISION PARENT`` prints a ``Probe`` as JSON. The passes are
those of a job, with LoRA's defaults on random tokens, in a process like a trainer's. How many and
how large they are follows from how long a first small one takes, so that all of them together take
about `PASSES_SECONDS` on any device; what larger ones take is then extrapolated.
"""

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.domain.estimates import Probe
from models.domain.training import Hyperparameters, Optimizer, Precision, TrainingSpec
from models.logs import configure_logging
from models.processes import die_with_parent
from models.settings import Settings, load_settings
from models.storage import open_store
from worker.base_models import load_tokenizer, materialise, pick_device
from worker.training import methods, objectives
from worker.training.forward import choose_forward
from worker.training.loop import TOKENS_PER_MICRO_BATCH, Trainer
from worker.training.memory import can_cache_weights, peak_bytes
from worker.training.model import build_model, describe_device, set_threads
from worker.training.objectives.base import Example
from worker.training.task import Task

PASSES_SECONDS = 45.0
"""About so long the measured passes may take together; a device too slow for the least of `PLANS`
takes longer."""

MANY_SHAPES = range(8, 28, 2)
"""Tokens of short passes on a CPU before what is measured: each brings some 50 shapes of products.

What a process keeps of kernels (`MEMORY_ENVIRONMENT`) is then as full as it gets in a job."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many passes of three kinds are measured: small, large, and of one long row.

    A large pass and the long row have the device's token budget divided by `divisor`, a small one
    a quarter of that.
    """

    divisor: int
    small: int
    large: int
    long: int

    def tokens(self, budget: int) -> int:
        """Return about how many tokens go through the model; two of them for `forward_share`."""
        return (budget * (self.small + 4 * (self.large + self.long + 2))) // (4 * self.divisor)


PLANS = (Plan(1, 8, 6, 2), Plan(1, 3, 2, 1), Plan(2, 3, 2, 1), Plan(4, 3, 2, 1))
"""From the most precise to the quickest, which takes an eighth of the first's time."""


def measure(
    settings: Settings, name: str, precision: Precision, seconds: float = PASSES_SECONDS
) -> Probe:
    """Return the measurements of base model `name`.

    Args:
        settings: Of this process.
        name: The base model.
        precision: How it is held.
        seconds: About how long the passes may take, loading the model not counted.

    Raises:
        TuneryError: it cannot be loaded.
    """
    directory, base = materialise(name, settings.models, open_store(settings.storage))
    device = pick_device("auto")
    if torch.device(device).type == "cpu":
        # Apart, since compiling takes memory and time that no job will take again.
        command = [sys.executable, "-m", "worker.kernels"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    started = time.perf_counter()
    pad_id = int(load_tokenizer(directory).pad_token_id or 0)
    params, method = methods.parse_params({"type": "lora"}), methods.get_method("lora")
    model = build_model(directory, precision, method, params, seed=0, device=device)
    cache = can_cache_weights(model, device)
    forward, _ = choose_forward(model, precision, device, pad_id, cache_weights=cache)
    start_seconds = time.perf_counter() - started
    budget = TOKENS_PER_MICRO_BATCH[torch.device(device).type]
    rows = RowMaker(base.vocab_size)
    spec = _spec(name, precision)
    task = Task(
        model=model,
        forward=forward,
        method=method,
        method_params=params,
        objective=objectives.get_objective("sft"),
        objective_params=objectives.parse_params({"type": "sft"}),
        spec=spec,
        train=rows.make([64], 0.5),
        valid=[],
        device=device,
    )
    stand = _Stand(task, Trainer(task))
    if torch.device(device).type == "cpu":
        for n_tokens in MANY_SHAPES:
            stand.run(rows.make([n_tokens], 0.5), counts=False)
    plan = _choose_plan(stand, rows, budget, seconds)
    large = budget // plan.divisor
    longest, small = min(large, base.max_length), large // 4
    # From small to large, since the most memory that a process has held never falls again. Rows of
    # many lengths, as in a job, which leave a heap in pieces.
    for _ in range(plan.small):
        stand.run(rows.mixed(small, 24, 128))
    small_peak = peak_bytes(device)
    for _ in range(plan.large):
        stand.run(rows.mixed(large, 48, 256))
    large_peak = peak_bytes(device)
    for _ in range(plan.long):
        stand.run(rows.make([longest], 0.5))
    token_bytes = max(0.0, (large_peak - small_peak) / (large - small))
    # Those rows had about a sixth of the budget each, as `mixed` draws them.
    squares = longest * longest - large * min(large // 2, budget // 6)
    square_bytes = max(0.0, (peak_bytes(device) - large_peak) / squares)
    passes = non_negative_fit(stand.features, stand.seconds)
    return Probe(
        device=describe_device(device),
        n_adapter=sum(each.numel() for each in stand.trainer.parameters.values()),
        token_budget=budget,
        fixed_bytes=round(small_peak - token_bytes * small),
        token_bytes=token_bytes,
        square_bytes=square_bytes,
        batch_seconds=passes[0],
        token_seconds=passes[1],
        square_seconds=passes[2],
        trained_seconds=passes[3],
        update_seconds=stand.update_seconds(),
        forward_share=stand.forward_share(rows.mixed(large, 48, 256)),
        start_seconds=start_seconds,
    )


def _choose_plan(stand: "_Stand", rows: "RowMaker", budget: int, seconds: float) -> Plan:
    """Return the most precise plan whose passes take at most `seconds`, or the quickest."""
    n_tokens = budget // 8
    batch = rows.make([64] * (n_tokens // 64), 0.5)
    stand.run(batch[:1], counts=False)  # chooses kernels
    token_seconds = stand.run(batch, counts=False) / n_tokens
    fitting = (plan for plan in PLANS if plan.tokens(budget) * token_seconds <= seconds)
    return next(fitting, PLANS[-1])


def non_negative_fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Return the least-squares coefficients, none below 0; what would be is left out."""
    chosen = list(range(len(features[0])))
    matrix, wanted = np.array(features), np.array(values)
    while True:
        scale = matrix[:, chosen].max(axis=0)
        found = np.linalg.lstsq(matrix[:, chosen] / scale, wanted, rcond=None)[0] / scale
        if (found >= 0).all():
            break
        chosen.pop(int((found * scale).argmin()))
    coefficients = [0.0] * len(features[0])
    for at, value in zip(chosen, found, strict=True):
        coefficients[at] = float(value)
    return coefficients


class RowMaker:
    """Rows of random tokens."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._draw = np.random.default_rng(0)
        self._random = random.Random(0)

    def make(self, lengths: Sequence[int], trained_share: float) -> list[Example]:
        rows = []
        for length in lengths:
            trained = np.zeros(length, np.bool_)
            trained[length - max(1, round(length * trained_share)) :] = True
            ids = self._draw.integers(self._vocabulary, size=length, dtype=np.int32)
            rows.append(Example(0, ids, trained, int(trained.sum())))
        return rows

    def mixed(self, n_tokens: int, shortest: int, longest: int) -> list[Example]:
        """Return rows of many lengths that fill a micro-batch nearly, half to all of it trained."""
        lengths: list[int] = []
        while (left := n_tokens - sum(lengths)) >= shortest:
            lengths.append(min(left, self._random.randint(shortest, longest)))
        return self.make(lengths, self._random.uniform(0.1, 0.9))


class _Stand:
    """Runs passes, and remembers what each was of and how long it took."""

    def __init__(self, task: Task, trainer: Trainer) -> None:
        self._task = task
        self.trainer = trainer
        self.features: list[list[float]] = []
        self.seconds: list[float] = []

    def run(self, batch: Sequence[Example], *, counts: bool = True) -> float:
        """Run a forward and a backward pass; return the seconds it took."""
        seconds = self._pass(batch, backward=True)
        if counts:
            lengths = [len(example.input_ids) for example in batch]
            squares = sum(length * length for length in lengths)
            n_trained = sum(example.n_trained for example in batch)
            self.features.append([1.0, sum(lengths), squares, n_trained])
            self.seconds.append(seconds)
        return seconds

    def forward_share(self, batch: Sequence[Example]) -> float:
        """Return how long a pass without gradients takes, as a share of one with them."""
        return self._pass(batch, backward=False) / self._pass(batch, backward=True)

    def _pass(self, batch: Sequence[Example], *, backward: bool) -> float:
        task = self._task
        task.model.train(backward)
        started = time.perf_counter()
        inputs = task.objective.collate(batch, task.device)
        with torch.set_grad_enabled(backward):
            loss = task.objective.loss(task.forward, inputs, task.objective_params).loss
            if backward:
                loss.backward()
        float(loss.detach())  # waits for a GPU
        return time.perf_counter() - started

    def update_seconds(self) -> float:
        parameters = self.trainer.parameters.values()

        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            self.trainer.optimizer.step()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)


def _spec(name: str, precision: Precision) -> TrainingSpec:
    return TrainingSpec(
        model=name,
        training_file="",
        seed=0,
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=1, learning_rate_multiplier=1.0),
        objective={"type": "sft"},
        peft={"type": "lora"},
        precision=precision,
        optimizer=Optimizer(learning_rate=1e-6),
        checkpoint_steps=1,
    )


def main() -> int:
    die_with_parent(int(sys.argv[3]))
    settings = load_settings()
    configure_logging(settings.log_level, "probe")
    set_threads(settings.worker.slots)
    precision = Precision.model_validate({"type": sys.argv[2]})
    sys.stdout.write(measure(settings, sys.argv[1], precision).model_dump_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
