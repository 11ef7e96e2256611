"""Training: tokens a second and peak memory beside TRL and a plain transformers + peft loop.

SmolLM2, LoRA of rank 16 on all linear layers, batches of 8 chats of 50 to 310 tokens, bfloat16 and
NF4 with double quantisation. Each contestant is a process of its own; they make one optimizer step
at a time in rotation, so that a noisy machine hits all alike, and ratios are medians over the steps
of one round. ``trl default`` is TRL as it comes on random batches; ``trl best`` is without
activation checkpointing on batches of like lengths; ``plain`` is a loop of forty lines on those
batches that makes logits only at labels. Padding is not counted as tokens. A processor without
products in bfloat16 makes them one number at a time, and ours computes in float32 there; a race in
which the others do so as well comes first then. Needs ``pip install trl``.
``python -m bench.train [--quick] [--json]``
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench._report import describe_machine, parse_options, print_figures
from worker.base_models import compute_dtype
from worker.launch import MEMORY_ENVIRONMENT
from worker.training.batches import epoch_batches

BASE = "smollm2-135m-instruct"
N_ROWS, BATCH = 320, 8
CONTESTANTS = ("ours", "plain", "trl best", "trl default")
QUICK_CONTESTANTS = ("ours", "plain", "trl default")
N_WARM = 2
PRECISIONS = ("bf16", "nf4")
IN_FLOAT32 = ("fp32", "nf4_fp32")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SUBJECTS = [
    *("the harbour crane", "a night ferry", "the bread oven", "a tide table", "the fish market"),
    *("an old lighthouse", "the boat yard", "a school garden", "the water tower", "a rope store"),
]
QUESTIONS = [
    "Tell me about {s}.",
    "Explain in simple words how {s} is run each day.",
    "Why would a small town want {s}? Give reasons.",
    "List the main costs of {s}, and say which one matters most when money and time are short.",
    "I have to give a talk on {s} next week to people who have never seen one. What should I say "
    "first, what should I leave out, and how do I close?",
]
SENTENCES = [
    "It needs {n} people on a normal day and {m} when it is busy.",
    "Most of the cost comes from power, which is about {n} percent of the total.",
    "People like it because it is quiet and easy to find.",
    "In year {m} the roof was repaired and the doors were painted blue.",
    "You should check every part twice before you start.",
    "A simple plan has {n} steps, and the last one is to write down what went wrong.",
    "It opens at {n} in the morning and closes at {m} at night.",
    "If it stops, wait for a while, look at the fuse, then call the person on the list.",
]


def chats(seed: int = 7) -> list[tuple[str, str]]:
    """Return questions and answers whose lengths vary as those of real chats do."""
    draw = random.Random(seed)
    rows = []
    for _ in range(N_ROWS):
        subject = draw.choice(SUBJECTS)
        n_sentences = min(14, max(1, int(draw.lognormvariate(1.2, 0.75))))
        answer = " ".join(
            draw.choice(SENTENCES).format(n=draw.randint(2, 60), m=draw.randint(61, 999))
            for _ in range(n_sentences)
        )
        rows.append((draw.choice(QUESTIONS).format(s=subject), f"About {subject}: {answer}"))
    return rows


def prepare(folder: Path) -> dict[str, float]:
    """Write what all contestants share; return facts about the rows."""
    from models.domain.rows import ChatRow
    from models.settings import load_settings
    from worker.base_models import load_tokenizer, materialise
    from worker.chat import ChatRenderer

    directory, _ = materialise(BASE, load_settings().models)
    (folder / "base").symlink_to(directory)
    renderer = ChatRenderer(load_tokenizer(directory))
    texts, rows = chats(), []
    for question, answer in texts:
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        rendered = renderer.render(ChatRow.model_validate({"messages": messages}))
        # TRL trains the line break after the last turn as well; all get the same ids.
        rows.append((rendered.input_ids, rendered.trained.index(True)))
    lengths = [len(ids) for ids, _ in rows]
    shuffled = list(range(N_ROWS))
    random.Random(3).shuffle(shuffled)
    batches = [shuffled[at : at + BATCH] for at in range(0, N_ROWS, BATCH)]
    grouped = epoch_batches(lengths, BATCH, 7, 0)
    whole = {"rows": rows, "texts": texts, "random": batches, "grouped": grouped}
    (folder / "rows.json").write_text(json.dumps(whole))

    def padding(order: list[list[int]]) -> float:
        slots = sum(len(batch) * max(lengths[row] for row in batch) for batch in order)
        return 1 - sum(lengths) / slots

    return {
        "median": statistics.median(lengths),
        "longest": max(lengths),
        "padding_random": padding(batches),
        "padding_grouped": padding(grouped),
    }


class Contestant:
    """A worker process and the answers it gave."""

    def __init__(self, name: str, precision: str, folder: Path) -> None:
        self.name = name
        self.steps: list[dict[str, Any]] = []
        self._log = (folder / f"{name}-{precision}.log").open("w+")
        # As a worker starts its trainers.
        environment = MEMORY_ENVIRONMENT if name == "ours" else {}
        command = [sys.executable, "-m", "bench._train_worker", name, precision, str(folder)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                **environment,
            },
        )

    def wait_until_ready(self) -> None:
        self._answer()

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.steps.append(self._answer())
        return self.steps[-1]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@@"):
                answer: dict[str, Any] = json.loads(line[2:])
                return answer
        self._log.seek(0)
        raise SystemExit(f"{self.name} ended:\n{self._log.read()[-3000:]}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def speeds(self, clock: str) -> list[float]:
        return [step["tokens"] / step[clock] for step in self.steps[N_WARM:]]


def race(precision: str, names: tuple[str, ...], n_rounds: int, folder: Path) -> list[Contestant]:
    """Let the contestants make `n_rounds` steps each, in rotation."""
    contestants: list[Contestant] = []
    try:
        for name in names:  # one after the other: the first makes the shared adapter
            contestants.append(Contestant(name, precision, folder))
            contestants[-1].wait_until_ready()
        for number in range(N_WARM + n_rounds):
            at = number % len(contestants)
            for contestant in [*contestants[at:], *contestants[:at]]:
                contestant.step()
    finally:
        for contestant in contestants:
            contestant.close()
    return contestants


def compare(precision: str, contestants: list[Contestant], n_rounds: int) -> dict[str, float]:
    """Print a table; return the ratios."""
    ours = contestants[0]
    title = f"{precision}, {n_rounds} rounds, {describe_machine()}"
    table = Table(
        "contestant", "tokens/s", "ours ×", "range", "ours × CPU", "peak MiB", title=title
    )
    figures = {}
    for each in contestants:
        wall = [a / b for a, b in zip(ours.speeds("wall"), each.speeds("wall"), strict=True)]
        cpu = [a / b for a, b in zip(ours.speeds("cpu"), each.speeds("cpu"), strict=True)]
        table.add_row(
            each.name,
            f"{statistics.median(each.speeds('wall')):.0f}",
            f"{statistics.median(wall):.2f}",
            f"{min(wall):.1f}–{max(wall):.1f}",
            f"{statistics.median(cpu):.2f}",
            f"{each.steps[-1]['rss']:.0f}",
        )
        if each is not ours:
            key = each.name.replace(" ", "_")
            figures[f"vs_{key}"] = round(statistics.median(wall), 2)
            figures[f"vs_{key}_cpu"] = round(statistics.median(cpu), 2)
            figures[f"rss_vs_{key}"] = round(ours.steps[-1]["rss"] / each.steps[-1]["rss"], 3)
    Console(width=100).print(table)
    for each in contestants:
        if each.name in ("plain", "trl best"):
            pairs = zip(ours.steps, each.steps, strict=True)
            gaps = [abs(mine["loss"] - its["loss"]) for mine, its in pairs]
            figures[f"loss_gap_{each.name.replace(' ', '_')}"] = round(statistics.mean(gaps), 5)
            sys.stdout.write(
                f"loss of the same {len(gaps)} steps beside {each.name}: mean |difference| "
                f"{statistics.mean(gaps):.4f}, largest {max(gaps):.4f}\n"
            )
    return figures


def main() -> None:
    options = parse_options(__doc__)
    figures: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = prepare(folder)
        figures["rows"] = facts
        sys.stdout.write(
            f"{N_ROWS} chats, median {facts['median']:.0f} tokens, longest {facts['longest']:.0f}; "
            f"padding {facts['padding_random']:.0%} in random batches, "
            f"{facts['padding_grouped']:.0%} in grouped ones\n"
        )
        n_rounds = 3 if options.quick else 14
        names = QUICK_CONTESTANTS if options.quick else CONTESTANTS
        precisions: tuple[str, ...] = PRECISIONS
        if compute_dtype("cpu") == torch.float32:
            precisions = (*IN_FLOAT32, *PRECISIONS)
        for precision in precisions[:1] if options.quick else precisions:
            contestants = race(precision, names, n_rounds, folder)
            figures[precision] = compare(precision, contestants, n_rounds)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
