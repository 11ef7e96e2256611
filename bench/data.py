"""Data sets: speed and memory of lint, normalising and tokenising, from 10 MB to 1 GB.

Generates chat files of growing size and measures each stage in a process of its own, so that peak
memory is the stage's. The peers on the same file: the standard library's ``json.loads`` for each
line, which is what most check scripts do, and ``orjson.loads``, a bound for any check that parses.
``python -m bench.data [--quick] [--json]``
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from bench._report import describe_machine, parse_options, print_figures

MEGABYTE = 1_000_000
SIZES = (10, 100, 1000)
QUICK_SIZES = (10, 40)
BASE = "smollm2-135m-instruct"
WORDS = 4000


def rows(seed: int) -> Iterator[bytes]:
    """Yield chat rows for ever: mostly plain, some with code, other scripts, or tools."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(WORDS)]
    scripts = ["水深は四メートルです。", "Schöne Grüße, «déjà vu»", "أربعة أمتار", "🚤⚓"]

    def text(n_words: int) -> str:
        plain = " ".join(draw.choices(words, k=n_words)).capitalize() + "."
        kind = draw.random()
        if kind < 0.10:
            return f"{plain} {draw.choice(scripts)}"
        if kind < 0.15:
            return f'{plain}\n\n```python\nif a < b:\n    print("{plain[:20]}")\n```'
        return plain

    tool = {"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "depth", "arguments": '{"pier":2}'}}
    while True:
        messages: list[dict[str, object]] = [{"role": "system", "content": text(12)}]
        row: dict[str, object] = {"messages": messages}
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": text(draw.randint(8, 40))})
            if draw.random() < 0.01:
                row["tools"] = [tool]
                messages.append({"role": "assistant", "tool_calls": [call]})
                messages.append({"role": "tool", "tool_call_id": "c", "content": "4"})
            messages.append({"role": "assistant", "content": text(draw.randint(20, 90))})
        yield orjson.dumps(row) + b"\n"


def generate(path: Path, megabytes: int) -> None:
    """Write a chat file of about this size; every row is different."""
    size = 0
    with path.open("wb") as file:
        for row in rows(megabytes):
            size += file.write(row)
            if size >= megabytes * MEGABYTE:
                return


def lint_only(path: Path, _: Path) -> None:
    from worker.data.lint import lint

    restart_clock()
    report = lint(path)
    assert report.n_valid_rows == report.n_rows > 0, report.findings[:3]


def lint_and_normalise(path: Path, scratch: Path) -> None:
    from worker.data.lint import LintOptions, Outputs, lint

    restart_clock()
    outputs = Outputs(scratch / "rows.arrow", scratch / "findings.jsonl", scratch / "cleaned.jsonl")
    lint(path, LintOptions(), outputs)


def tokenise(path: Path, scratch: Path) -> None:
    """Render and tokenise, in the process that does it for a job; the lint is not counted."""
    from models.settings import load_settings
    from worker.base_models import materialise
    from worker.training.batches import RowPolicy
    from worker.training.tokenise import TokeniseOrder, tokenise_in_child

    lint_and_normalise(path, scratch)
    directory, _ = materialise(BASE, load_settings().models)
    order = TokeniseOrder(
        rows=scratch / "rows.arrow",
        tokens=scratch / "tokens.arrow",
        policy=RowPolicy("skip", "truncate", 2048),  # the base's template refuses tools
        param="training_file",
    )
    restart_clock()
    tokenise_in_child(order, directory)


def parse_with_json(path: Path, _: Path) -> None:
    with path.open("rb") as file:
        for line in file:
            json.loads(line)


def parse_with_orjson(path: Path, _: Path) -> None:
    with path.open("rb") as file:
        for line in file:
            orjson.loads(line)


STAGES: dict[str, Callable[[Path, Path], None]] = {
    "lint": lint_only,
    "lint + normalise": lint_and_normalise,
    "tokenise": tokenise,
    "json.loads": parse_with_json,
    "orjson.loads": parse_with_orjson,
}
_started = 0.0


def restart_clock() -> None:
    global _started
    _started = time.perf_counter()


def run_stage(stage: str, path: Path) -> dict[str, float]:
    """Run one stage in this process and return its speed (MB/s) and the peak memory (MiB)."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        restart_clock()
        STAGES[stage](path, Path(scratch))
        seconds = time.perf_counter() - _started
    who = resource.RUSAGE_CHILDREN if stage == "tokenise" else resource.RUSAGE_SELF
    peak = resource.getrusage(who).ru_maxrss / 1024
    return {"mb_per_s": path.stat().st_size / MEGABYTE / seconds, "peak_mib": peak}


def in_child(stage: str, path: Path) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, "-m", "bench.data", "--stage", stage, "--file", str(path)],
        stdout=subprocess.PIPE,
        check=True,
    )
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        print_figures(run_stage(sys.argv[2], Path(sys.argv[4])))
        return
    options = parse_options(__doc__)
    table = Table("stage", "file", "MB/s", "× json.loads", "peak MiB", title=describe_machine())
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in QUICK_SIZES if options.quick else SIZES:
            path = Path(folder) / f"{size}.jsonl"
            generate(path, size)
            peer = in_child("json.loads", path)
            for stage in STAGES:
                found = peer if stage == "json.loads" else in_child(stage, path)
                figures[f"{stage}, {size} MB"] = found
                ratio = found["mb_per_s"] / peer["mb_per_s"]
                table.add_row(
                    stage,
                    f"{size} MB",
                    f"{found['mb_per_s']:.1f}",
                    f"{ratio:.2f}",
                    f"{found['peak_mib']:.0f}",
                )
            path.unlink()
    Console().print(table)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
