"""How good the estimates are: ten different jobs, each estimated, run, and measured.

Runs a whole service in a temporary home. Every job is estimated over the API before it is
submitted, so later estimates are corrected by earlier jobs, as they are for a user.
``python -m bench.estimate [--quick] [--json]``
"""

import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from api.cli.background import running_service, wait_for_model
from api.cli.client import Client
from api.cli.demo import BASE
from api.cli.estimate import wait_for_estimate
from api.cli.home import Home
from bench._report import describe_machine, parse_options, print_figures

POLL_SECONDS = 0.2
GOALS = {"peak_bytes": 0.20, "seconds": 0.30}


@dataclass(frozen=True, slots=True)
class Case:
    """One job: rows of about so many words, and what differs from the defaults."""

    name: str
    n_rows: int
    n_words: int
    body: dict[str, Any]


def cases() -> list[Case]:
    def job(batch: int, precision: str = "nf4", r: int = 16, **others: Any) -> dict[str, Any]:
        return {
            "hyperparameters": {"n_epochs": 1, "batch_size": batch},
            "precision": {"type": precision},
            "peft": {"type": "lora", "r": r, **others},
        }

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return [
        Case("nf4, r 16, batch 8", 120, 60, job(8)),
        Case("nf4, r 4, batch 2", 60, 60, job(2, r=4)),
        Case("nf4, r 128, batch 8", 80, 60, job(8, r=128)),
        Case("nf4, short rows, batch 16", 320, 15, job(16)),
        Case("nf4, long rows, batch 4", 40, 400, job(4)),
        Case("bf16, r 16, batch 8", 120, 60, job(8, "bf16")),
        Case("bf16, attention only, batch 8", 120, 60, job(8, "bf16", target_modules=attention)),
        Case("bf16, held-out half, batch 4", 96, 60, job(4, "bf16") | {"validation_split": 0.5}),
        Case("fp32, r 16, batch 4", 40, 60, job(4, "fp32")),
        Case("fp32, r 64, batch 1", 24, 120, job(1, "fp32", r=64)),
    ]


def rows(case: Case) -> Iterator[bytes]:
    """Yield chat rows whose answers have half to twice the words that the case names."""
    draw = random.Random(case.name)
    for number in range(case.n_rows):
        n_words = round(case.n_words * 2 ** draw.uniform(-1, 1))
        answer = " ".join(
            draw.choices(["pier", "berth", "tide", "gate", "code", "depth"], k=n_words)
        )
        turns = [("user", f"Tell me about mooring number {number}."), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        yield json.dumps({"messages": messages}).encode() + b"\n"


def run(client: Client, case: Case, folder: Path) -> dict[str, float]:
    """Return estimated and measured peak bytes and seconds of one job."""
    data = folder / "rows.jsonl"
    data.write_bytes(b"".join(rows(case)))
    file = client.upload(data)
    body = {"model": BASE, "training_file": file["id"], "seed": 1, **case.body}
    expected = wait_for_estimate(client, body, Console(stderr=True))
    job = client.post("/fine_tuning/jobs", body)
    while job["finished_at"] is None or job["measured"] is None:
        time.sleep(POLL_SECONDS)
        job = client.get(f"/fine_tuning/jobs/{job['id']}")
        if job["status"] not in ("succeeded", "running", "queued", "validating_files"):
            raise SystemExit(f"The job ended as {job['status']}: {job['error']}")
    return {
        "estimated_peak_bytes": expected["peak_bytes"],
        "estimated_seconds": expected["seconds"],
        "peak_bytes": job["measured"]["peak_bytes"],
        "seconds": job["measured"]["seconds"],
        "uncorrected_peak_bytes": job["measured"]["reckoned_peak_bytes"],
    }


def main() -> None:
    options = parse_options(__doc__)
    chosen = [cases()[1]] if options.quick else cases()
    table = Table(
        *("job", "memory", "estimated", "off", "time", "estimated", "off"),
        title=describe_machine(),
    )
    figures: dict[str, dict[str, float]] = {}
    progress = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(Home(Path(folder) / "service")) as client,
    ):
        wait_for_model(client, BASE)
        for case in chosen:
            found = figures[case.name] = run(client, case, Path(folder))
            cells = []
            for what, unit, scale in (("peak_bytes", "GiB", 2**30), ("seconds", "s", 1)):
                off = found[what] / found[f"estimated_{what}"] - 1
                found[f"{what}_off"] = off
                cells += [
                    f"{found[what] / scale:.2f} {unit}",
                    f"{found[f'estimated_{what}'] / scale:.2f}",
                    f"{off:+.0%}" + ("" if abs(off) <= GOALS[what] else " !"),
                ]
            table.add_row(case.name, *cells)
            progress.print(case.name, *cells, sep=" | ")  # the ten take long
    Console().print(table)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
