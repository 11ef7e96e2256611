"""Losses of the same 50 steps in bfloat16, beside TRL's: and how far TRL's are from its own.

``trl turned`` has the rows of each batch the other way round, which changes no formula, only in
which order numbers are rounded: what it differs by from ``trl best`` is what rounding alone does.
``exact`` computes in float32 on the same weights: what rounding to bfloat16 does to each.
Contestants, rows and rotation are those of ``bench.train``. Needs ``pip install trl``.
``python -m bench.losses [--quick] [--json]``
"""

import statistics
import tempfile
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench._report import describe_machine, parse_options, print_figures
from bench.train import N_WARM, Contestant, prepare, race

CONTESTANTS = ("ours", "trl best", "trl turned", "plain")
N_STEPS, QUICK_STEPS = 50, 6
WITHIN = 0.01
"""Goal: ours from TRL's in the mean, in nats."""


def gaps(one: Contestant, other: Contestant) -> list[float]:
    return [a["loss"] - b["loss"] for a, b in zip(one.steps, other.steps, strict=True)]


def main() -> None:
    options = parse_options(__doc__)
    n_steps = QUICK_STEPS if options.quick else N_STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        # Not all at once: together they take more memory than a small machine has.
        contestants = race("bf16", CONTESTANTS, n_steps - N_WARM, folder)
        contestants += race("bf16", ("exact",), n_steps - N_WARM, folder)
    first, last = contestants[0].steps[0]["loss"], contestants[0].steps[-1]["loss"]
    title = f"{n_steps} steps, loss {first:.2f} to {last:.2f}; {describe_machine()}"
    table = Table("losses of", "beside", "mean |difference|", "largest", "mean", title=title)
    figures = {}
    for one, other in combinations(contestants, 2):
        found = gaps(one, other)
        mean, largest = statistics.mean(map(abs, found)), max(map(abs, found))
        mark = " !" if (one.name, other.name) == ("ours", "trl best") and mean > WITHIN else ""
        drift = statistics.mean(found)
        table.add_row(one.name, other.name, f"{mean:.4f}{mark}", f"{largest:.4f}", f"{drift:+.4f}")
        key = f"{one.name} beside {other.name}".replace(" ", "_")
        figures[key] = {"mean": mean, "largest": largest, "drift": drift}
    Console().print(table)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
