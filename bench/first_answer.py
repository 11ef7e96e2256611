"""How soon a new adapter answers after its job has succeeded, beside the base model.

Runs a whole service (``tunery up`` in a temporary home), trains small adapters on SmolLM2 one after
the other, and asks each by name as soon as its job says ``succeeded``. Then one resident adapter
and the base answer other questions by turns. Times are from the request to the first streamed
token, over HTTP. ``python -m bench.first_answer [--quick] [--json]``
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

QUESTION = "The gate will not open with my code. It cannot wait!"
POLL_SECONDS = 0.05
REST_SECONDS = 20.0
"""By then the worker has its next trainer ready, and nothing else runs."""
N_TURNS = 15
RESIDENT, RESIDENT_BASE = "resident adapter, at rest", "base, at rest"


def first_token_seconds(client: Client, model: str, question: str = QUESTION) -> float:
    """Return the time from sending a request to its first piece of text."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 4,
        "stream": True,
    }
    started = time.perf_counter()
    first = 0.0
    for event in client.stream("/chat/completions", body):
        has_text = any(choice["delta"].get("content") for choice in event["choices"])
        if has_text and not first:
            first = time.perf_counter() - started
    return first


def train(client: Client, data: Path, seed: int) -> str:
    """Train one small adapter; return its name at the moment its job has succeeded."""
    file = client.upload(data)
    body = {
        "model": BASE,
        "training_file": file["id"],
        "seed": seed,
        "hyperparameters": {"n_epochs": 1, "batch_size": 4},
    }
    job = client.post("/fine_tuning/jobs", body)
    while job["finished_at"] is None:
        time.sleep(POLL_SECONDS)
        job = client.get(f"/fine_tuning/jobs/{job['id']}")
    if job["status"] != "succeeded":
        raise SystemExit(f"The job ended as {job['status']}: {job['error']}")
    return str(job["fine_tuned_model"])


def measure(home: Path, n_adapters: int) -> dict[str, list[float]]:
    """Return seconds to the first token: base, new adapters, the same adapters asked again."""
    rows = home / "rows.jsonl"
    rows.write_bytes(b"".join(TRAINING.read_bytes().splitlines(keepends=True)[:8]))
    times: dict[str, list[float]] = {"base": [], "new adapter": [], "same adapter again": []}
    times |= {RESIDENT: [], RESIDENT_BASE: []}
    with running_service(Home(home / "service")) as client:
        wait_for_model(client, BASE)
        for seed in range(n_adapters):
            name = train(client, rows, seed)
            times["new adapter"].append(first_token_seconds(client, name))
            times["same adapter again"].append(first_token_seconds(client, name))
            times["base"].append(first_token_seconds(client, BASE))
        time.sleep(REST_SECONDS)
        for number in range(N_TURNS):
            question = f"Berth {number} is taken. {QUESTION}"
            times[RESIDENT].append(first_token_seconds(client, name, question))
            times[RESIDENT_BASE].append(first_token_seconds(client, BASE, question))
    return times


def main() -> None:
    options = parse_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder), 2 if options.quick else 8)
    base = statistics.median(times["base"])
    table = Table("first token of", "median", "slowest", "× base", title=describe_machine())
    figures: dict[str, dict[str, float]] = {}
    for what, seconds in times.items():
        middle, slowest = statistics.median(seconds), max(seconds)
        figures[what] = {"median_s": middle, "max_s": slowest, "ratio": middle / base}
        table.add_row(what, f"{middle:.3f} s", f"{slowest:.3f} s", f"{middle / base:.2f}")
    pairs = zip(times[RESIDENT], times[RESIDENT_BASE], strict=True)
    more = statistics.median(adapter - own for adapter, own in pairs)
    figures["resident over base"] = {"median_s": more}
    Console().print(table)
    Console().print(f"A resident adapter's first token over the base's: {1000 * more:.1f} ms")
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
