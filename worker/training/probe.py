"""Measure what training on one base model takes.

``python -m worker.training.probe BASE PRECISION PARENT`` prints a ``Probe`` as JSON. The passes are
those of a job, with LoRA's defaults on random tokens, in a process like a trainer's.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

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

REPEATS = 2
MIXED_BATCHES = 4
"""Batches of rows of all lengths, after which a heap has about the size that a job's will have."""


def measure(settings: Settings, name: str, precision: Precision) -> Probe:
    """Return the measurements of base model `name`.

    Raises:
        TuneryError: it cannot be loaded.
    """
    directory, base = materialise(name, settings.models, open_store(settings.storage))
    device = pick_device("auto")
    started = time.perf_counter()
    pad_id = int(load_tokenizer(directory).pad_token_id or 0)
    params, method = methods.parse_params({"type": "lora"}), methods.get_method("lora")
    model = build_model(directory, precision, method, params, seed=0, device=device)
    cache = can_cache_weights(model, device)
    forward, _ = choose_forward(model, precision, device, pad_id, cache_weights=cache)
    start_seconds = time.perf_counter() - started
    budget = TOKENS_PER_MICRO_BATCH[torch.device(device).type]
    rows = _RowMaker(base.vocab_size)
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
    longest = min(budget, base.max_length)
    quarter = rows.make([budget // 32] * 8, 0.5)
    batches = [
        quarter,
        rows.make([budget // 8] * 8, 0.5),
        rows.make([budget // 8] * 8, 0.1),
        rows.make([longest], 0.5),
    ]
    stand.seconds(quarter)  # the first pass of a kind chooses kernels
    small_peak = peak_bytes(device)
    seconds = [stand.seconds(batch) for batch in batches]
    for _ in range(MIXED_BATCHES):
        stand.seconds(rows.mixed(budget), repeats=1)
    token_bytes = max(0.0, (peak_bytes(device) - small_peak) / (budget - budget // 4))
    coefficients = non_negative_fit([_features(batch) for batch in batches], seconds)
    return Probe(
        device=describe_device(device),
        n_adapter=sum(each.numel() for each in stand.trainer.parameters.values()),
        token_budget=budget,
        fixed_bytes=round(small_peak - token_bytes * (budget // 4)),
        token_bytes=token_bytes,
        batch_seconds=coefficients[0],
        token_seconds=coefficients[1],
        square_seconds=coefficients[2],
        trained_seconds=coefficients[3],
        update_seconds=stand.update_seconds(),
        forward_share=stand.seconds(batches[1], forward_only=True) / seconds[1],
        start_seconds=start_seconds,
    )


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


def _features(batch: Sequence[Example]) -> list[float]:
    lengths = [len(example.input_ids) for example in batch]
    squares = sum(length * length for length in lengths)
    return [1.0, sum(lengths), squares, sum(example.n_trained for example in batch)]


class _RowMaker:
    """Rows of random tokens."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._draw = np.random.default_rng(0)
        self._lengths = random.Random(0)

    def make(self, lengths: Sequence[int], trained_share: float) -> list[Example]:
        rows = []
        for length in lengths:
            trained = np.zeros(length, np.bool_)
            trained[length - max(1, round(length * trained_share)) :] = True
            ids = self._draw.integers(self._vocabulary, size=length, dtype=np.int32)
            rows.append(Example(0, ids, trained, int(trained.sum())))
        return rows

    def mixed(self, n_tokens: int) -> list[Example]:
        """Return rows of many lengths that fill a micro-batch nearly."""
        lengths: list[int] = []
        while (length := self._lengths.randint(16, n_tokens // 3)) <= n_tokens - sum(lengths):
            lengths.append(length)
        return self.make(lengths or [n_tokens], 0.5)


class _Stand:
    """Runs and times passes."""

    def __init__(self, task: Task, trainer: Trainer) -> None:
        self._task = task
        self.trainer = trainer

    def seconds(
        self, batch: Sequence[Example], *, forward_only: bool = False, repeats: int = REPEATS
    ) -> float:
        task = self._task
        task.model.train(not forward_only)

        def run() -> None:
            inputs = task.objective.collate(batch, task.device)
            with torch.set_grad_enabled(not forward_only):
                loss = task.objective.loss(task.forward, inputs, task.objective_params).loss
                if not forward_only:
                    loss.backward()
            float(loss.detach())  # waits for a GPU

        return statistics.median(_timed(run) for _ in range(repeats))

    def update_seconds(self) -> float:
        parameters = self.trainer.parameters.values()

        def run() -> None:
            float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            self.trainer.optimizer.step()

        return statistics.median(_timed(run) for _ in range(REPEATS))


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


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
