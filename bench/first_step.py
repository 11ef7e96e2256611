"""How soon a job makes its first optimizer step, from its submission, with a warm worker.

Runs a whole service (``tunery up`` in a temporary home). Each job is cancelled after its first step
and the next is submitted once the worker has had time to warm another trainer.
``python -m bench.first_step [--quick] [--json]``
"""

import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from api.cli.background import running_service, wait_for_model
from api.cli.client import Client
from api.cli.demo import BASE, TRAINING
from api.cli.home import Home
from bench._report import describe_machine, parse_options, print_figures

POLL_SECONDS = 0.1
"""Asking more often takes the cores away from the step on a small machine."""
WARM_UP_SECONDS = 30.0
"""Within this time a trainer has imported torch, loaded the base and rehearsed."""
GOAL_SECONDS = 3.0


def first_step_seconds(client: Client, file_id: str, precision: str, seed: int) -> float:
    """Submit a job; return the seconds until its first step is there to be read."""
    body = {
        "model": BASE,
        "training_file": file_id,
        "seed": seed,
        "precision": {"type": precision},
        "hyperparameters": {"n_epochs": 5, "batch_size": 4},
    }
    started = time.perf_counter()
    job = client.post("/fine_tuning/jobs", body)
    while job["step"] < 1:
        time.sleep(POLL_SECONDS)
        job = client.get(f"/fine_tuning/jobs/{job['id']}")
        if job["finished_at"] is not None and job["step"] < 1:
            raise SystemExit(f"The job ended as {job['status']}: {job['error']}")
    seconds = time.perf_counter() - started
    if job["finished_at"] is None:
        client.post(f"/fine_tuning/jobs/{job['id']}/cancel")
    while job["finished_at"] is None:
        time.sleep(POLL_SECONDS)
        job = client.get(f"/fine_tuning/jobs/{job['id']}")
    return seconds


def main() -> None:
    options = parse_options(__doc__)
    n_jobs = 1 if options.quick else 10
    table = Table("precision", "median", "fastest", "slowest", title=describe_machine())
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder) / "service")
        with running_service(home) as client:
            wait_for_model(client, BASE)
            file_id = client.upload(TRAINING)["id"]
            while client.get(f"/files/{file_id}")["status"] == "uploaded":
                time.sleep(POLL_SECONDS)
            for precision in ("nf4",) if options.quick else ("nf4", "bf16"):
                seconds = []
                for seed in range(n_jobs):
                    time.sleep(WARM_UP_SECONDS)
                    seconds.append(first_step_seconds(client, file_id, precision, seed))
                middle = statistics.median(seconds)
                figures[precision] = {
                    "median_s": middle,
                    "min_s": min(seconds),
                    "max_s": max(seconds),
                }
                mark = "" if middle <= GOAL_SECONDS else " !"
                table.add_row(
                    precision,
                    f"{middle:.2f} s{mark}",
                    f"{min(seconds):.2f} s",
                    f"{max(seconds):.2f} s",
                )
    Console().print(table)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
