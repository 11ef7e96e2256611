"""Memory and exactness of MEFT: what a step keeps at 6, 12 and 24 layers, and what comes back.

First table: MiniLM's layers repeated, in float32; what the graph of a step keeps, by how much a
step raises the peak of a process of its own, seconds a step. Second: real models, the integers that
do not come back, and the relative error of the inverse in floats, as published.
``python -m bench.meft [--quick] [--json]``
"""

import json
import subprocess
import sys
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, BertModel
from transformers.utils.logging import disable_progress_bar

from bench._float_inverse import float_errors
from bench._meft_worker import WAYS, minilm_directory
from bench._report import describe_machine, parse_options, print_figures
from models.settings import load_settings
from worker.base_models import materialise
from worker.fixed_point import from_grid
from worker.training.reversible.tuner import MeftConfig, stack_of

DEPTHS = (6, 12, 24)
SHAPE, QUICK_SHAPE = (8, 128), (2, 32)
QUICK_WAYS = ("full", "gradient checkpointing", "meft1 exact, 7 bits")
PUBLISHED_SCALE = 0.1
SHOWN_LAYERS = (1, 3, 6, 12, 24, 30)


def measure_memory(
    ways: tuple[str, ...], depths: tuple[int, ...], shape: tuple[int, int]
) -> dict[str, Any]:
    """Return the figures of every way at every depth, each from a process of its own."""
    batch, length = shape
    found: dict[str, Any] = {}
    for way in ways:
        for depth in depths:
            command = [sys.executable, "-m", "bench._meft_worker", way]
            numbers = [str(depth), str(batch), str(length)]
            ran = subprocess.run(command + numbers, capture_output=True, text=True, check=True)
            found.setdefault(way, {})[depth] = json.loads(ran.stdout.splitlines()[-1])
    return found


def memory_table(found: dict[str, Any], shape: tuple[int, int]) -> Table:
    depths = list(next(iter(found.values())))
    table = Table(title=f"batch {shape[0]}, {shape[1]} tokens, float32; {describe_machine()}")
    table.add_column("")
    for what in ("kept, MiB", "peak, MiB", "step, s"):
        for depth in depths:
            table.add_column(f"{what}\n{depth} layers", justify="right")
    for way, by_depth in found.items():
        cells = [
            f"{by_depth[depth][key]:{form}}"
            for key, form in (("saved_mib", ".2f"), ("peak_mib", ".0f"), ("seconds", ".2f"))
            for depth in depths
        ]
        table.add_row(way, *cells)
    return table


def check_exactness(model: Any, config: MeftConfig, ids: torch.Tensor) -> dict[str, Any]:
    """Return how many integers of a step do not come back, and the errors of floats."""
    adapted: Any = get_peft_model(model, config)
    stack = stack_of(adapted)
    stack.keeps_history = True
    adapted.train()
    output = adapted(input_ids=ids)
    plan = stack.last_plan
    assert plan is not None
    assert plan.history is not None
    n_integers = sum(2 * x1.numel() for x1, _ in plan.history)
    hidden = from_grid(plan.history[0][0], torch.float32)
    output[0].float().sum().backward()
    adapted.eval()
    return {
        "integers": n_integers,
        "mismatches": plan.n_mismatches,
        "float_errors": float_errors(plan, hidden, PUBLISHED_SCALE),
        "float_errors_own_scale": float_errors(plan, hidden, 2.0**-config.lambda_bits),
    }


def real_models(*, quick: bool) -> dict[str, Any]:
    """Return the figures of MiniLM, and of SmolLM2 unless `quick`."""
    found = {}
    torch.manual_seed(0)
    ids = torch.randint(1000, 30_000, (2, 32))
    for variant in ("meft1", "meft2", "meft3"):
        model = BertModel.from_pretrained(minilm_directory())
        config = MeftConfig(variant=variant, lambda_bits=3)
        found[f"MiniLM, 6 layers, {variant}, 3 bits"] = check_exactness(model, config, ids)
    if not quick:
        directory, _ = materialise("smollm2-135m-instruct", load_settings().models)
        for bits in (3, 7):
            decoder = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            decoder.config.use_cache = False
            config = MeftConfig(lambda_bits=bits, activation="silu")
            found[f"SmolLM2, 30 layers, meft1, {bits} bits"] = check_exactness(decoder, config, ids)
    return found


def exactness_table(found: dict[str, Any]) -> Table:
    title = f"integers that do not come back; error of the float inverse, λ = {PUBLISHED_SCALE}"
    table = Table(title=title)
    table.add_column("")
    for name in ("integers", "wrong", *(f"{depth} layers" for depth in SHOWN_LAYERS)):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in found.items():
        errors = row["float_errors"]
        cells = [f"{errors[n - 1]:.0e}" if n <= len(errors) else "" for n in SHOWN_LAYERS]
        table.add_row(name, f"{row['integers']:,}", str(row["mismatches"]), *cells)
    return table


def main() -> None:
    options = parse_options(__doc__)
    shape = QUICK_SHAPE if options.quick else SHAPE
    ways, depths = (QUICK_WAYS, DEPTHS[:2]) if options.quick else (WAYS, DEPTHS)
    disable_progress_bar()
    memory = measure_memory(ways, depths, shape)
    exact = real_models(quick=options.quick)
    console = Console(width=150)
    console.print(memory_table(memory, shape))
    console.print(exactness_table(exact))
    if options.json:
        print_figures({"memory": memory, "exactness": exact})


if __name__ == "__main__":
    main()
