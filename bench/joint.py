"""Four small jobs over one base in shared passes, against one after another.

The jobs differ in rank and rows; a round makes one step of each, by turns in the two ways, each way
going first in half of the rounds, over the same rows. Ratios are of paired rounds. Both ways have
one base in memory. The process has a trainer's allocator and garbage collection. NF4 weights are
kept dequantised, as a trainer does where memory is ample, and in the row ``nf4 per use`` are
dequantised in each pass, as it does where memory is short and on GPUs.
On a processor without fast bfloat16 both precisions compute in float32.
``python -m bench.joint [--quick] [--json]``
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from api.cli.demo import BASE
from bench._report import describe_machine, parse_options, print_figures
from models.domain.reports import StepMetrics
from models.domain.training import Hyperparameters, Optimizer, Precision, TrainingSpec
from models.settings import child_environment, load_settings
from worker.base_models import compute_dtype, materialise, pick_device
from worker.launch import MEMORY_ENVIRONMENT
from worker.training import methods, objectives
from worker.training.forward import PackedForward, choose_forward
from worker.training.joint import JointRun, Member
from worker.training.loop import Trainer
from worker.training.memory import can_cache_weights, peak_bytes
from worker.training.model import adapt, load_base
from worker.training.probe import RowMaker
from worker.training.report import Silence
from worker.training.run import import_libraries
from worker.training.task import Task

RANKS = (8, 16, 16, 32)
BATCHES = (1, 1, 2, 2)
LENGTHS = (40, 56, 72, 88)
ROUNDS, QUICK_ROUNDS = 6, 2
PER_USE = " per use"
GOALS = {"nf4": 1.4, f"nf4{PER_USE}": 1.4, "bf16": 1.2}
"""By precision and what becomes of dequantised weights."""


def trainers(kind: str) -> list[Trainer]:
    """Return a trainer for each job, all over one base held as `kind` of `GOALS` says."""
    precision = Precision.model_validate({"type": kind.removesuffix(PER_USE)})
    device = pick_device("auto")
    directory, info = materialise(BASE, load_settings().models)
    method = methods.get_method("lora")
    base = load_base(directory, precision, device)
    model = None
    jobs = []
    for index, rank in enumerate(RANKS):
        params = methods.parse_params({"type": "lora", "r": rank})
        model = adapt(model or base, method, params, index, f"job{index}")
        jobs.append(params)
    assert model is not None
    cache = not kind.endswith(PER_USE) and can_cache_weights(model, device)
    forward, reason = choose_forward(model, precision, device, 0, cache_weights=cache)
    if not isinstance(forward, PackedForward):
        raise SystemExit(f"{BASE} cannot be packed: {reason}")
    rows = RowMaker(info.vocab_size)
    made = []
    for index, params in enumerate(jobs):
        lengths = [LENGTHS[(index + at) % len(LENGTHS)] for at in range(4 * BATCHES[index])]
        spec = TrainingSpec(
            model=BASE,
            training_file="",
            seed=index,
            hyperparameters=Hyperparameters(
                n_epochs=50, batch_size=BATCHES[index], learning_rate_multiplier=1.0
            ),
            objective=objectives.parse_params({"type": "sft"}).model_dump(),
            peft=params.model_dump(),
            precision=precision,
            optimizer=Optimizer(learning_rate=1e-4),
            checkpoint_steps=100_000,
        )
        task = Task(
            model=model,
            forward=forward.for_adapter(f"job{index}"),
            method=method,
            method_params=params,
            objective=objectives.get_objective("sft"),
            objective_params=objectives.parse_params({"type": "sft"}),
            spec=spec,
            train=rows.make(lengths, 0.5),
            valid=[],
            device=device,
            adapter=f"job{index}",
        )
        made.append(Trainer(task))
    return made


def measure(kind: str, n_rounds: int) -> dict[str, float]:
    """Return seconds of a round both ways, the median ratio of paired rounds, and peaks in MiB."""
    import_libraries()
    made = trainers(kind)

    def save(trainer: Trainer, point: StepMetrics) -> None:
        raise AssertionError("no checkpoint is due")

    together = JointRun([Member(each, Silence(), save, lambda: None) for each in made])

    def apart() -> None:
        for trainer in made:
            trainer.step()

    def timed(round_: Callable[[], object], step: int) -> float:
        for trainer in made:
            trainer.progress.step = step  # both ways have the same rows
        started = time.perf_counter()
        round_()
        return time.perf_counter() - started

    apart()
    peak_apart = peak_bytes(made[0].task.device)
    together.round()
    seconds: list[tuple[float, float]] = []
    for step in range(n_rounds):
        if step % 2:
            joint = timed(together.round, step)
            seconds.append((timed(apart, step), joint))
        else:
            alone = timed(apart, step)
            seconds.append((alone, timed(together.round, step)))
    return {
        "apart_s": statistics.median(apart for apart, _ in seconds),
        "together_s": statistics.median(joint for _, joint in seconds),
        "ratio": statistics.median(apart / joint for apart, joint in seconds),
        "peak_apart_mib": peak_apart / 2**20,
        "peak_together_mib": peak_bytes(made[0].task.device) / 2**20,
    }


def main() -> None:
    if sys.argv[1:2] == ["--kind"]:
        print_figures(measure(sys.argv[2], int(sys.argv[3])))
        return
    options = parse_options(__doc__)
    n_rounds = QUICK_ROUNDS if options.quick else ROUNDS
    dtype = compute_dtype(pick_device("auto"))
    title = f"{describe_machine()}; products in {str(dtype).removeprefix('torch.')}"
    table = Table("base", "apart", "together", "ratio", "peak apart", "together", title=title)
    figures = {}
    for kind, goal in GOALS.items():
        command = [sys.executable, "-m", "bench.joint", "--kind", kind, str(n_rounds)]
        output = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            check=True,
            env=child_environment() | MEMORY_ENVIRONMENT,
        ).stdout
        found = figures[kind.replace(" ", "_")] = json.loads(output.splitlines()[-1])
        mark = "" if found["ratio"] >= goal else " !"
        table.add_row(
            kind,
            f"{found['apart_s']:.2f} s",
            f"{found['together_s']:.2f} s",
            f"{found['ratio']:.2f} ×{mark}",
            f"{found['peak_apart_mib']:.0f} MiB",
            f"{found['peak_together_mib']:.0f} MiB",
        )
    Console().print(table)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
