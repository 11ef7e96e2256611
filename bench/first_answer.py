"""How soon a new adapter answers after its job has succeeded, beside the base model.

Runs a whole service (``tunery up`` in a temporary home), trains small adapters on SmolLM2 one after
the other, and asks each by name as soon as its job says ``succeeded``. Then, at rest, with another
question each time that both get, in changing order: the base and one adapter in memory; and after a
new start of the service, with nothing of them on the inference server's disk, the base and adapters
of rank 16 on all linear layers that only the object store has. Half of those are asked with a
system message of their own, of which neither has states stored; half with the template's, of which
the base has them and an adapter that is new has not. Times are from the request to the first
streamed token, over HTTP. ``python -m bench.first_answer [--quick | --rest] [--json]``
"""

import argparse
import shutil
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from api.cli.background import running_service, wait_for_model
from api.cli.client import Client
from api.cli.demo import BASE, TRAINING
from api.cli.home import Home
from bench._report import describe_machine, print_figures
from models.domain.adapter_files import ADAPTER_FILES
from models.settings import Settings

QUESTION = "The gate will not open with my code. It cannot wait!"
POLL_SECONDS = 0.05
REST_SECONDS = 20.0
"""By then the worker has its next trainer ready, and nothing else runs."""
N_TURNS = 40
NEW, AGAIN, BESIDE = "new adapter", "same adapter again", "base"
RESIDENT, RESIDENT_BASE = "resident adapter, at rest", "base beside it"
COLD, COLD_BASE = "adapter from the store, at rest", "base beside it (store)"
KNOWN, KNOWN_BASE = "the same, a beginning stored of the base", "base with it stored"
OWN_SYSTEM = "{} is the number of the harbour whose guests you answer, in short and friendly words."
Times = dict[str, list[float]]


def first_token_seconds(
    client: Client, model: str, question: str = QUESTION, system: str = ""
) -> float:
    """Return the time from sending a request to its first piece of text."""
    messages = [{"role": "system", "content": system}] if system else []
    body = {
        "model": model,
        "messages": [*messages, {"role": "user", "content": question}],
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


def measure_new(home: Path, n_adapters: int) -> Times:
    """Return seconds to the first token: base, new adapters, the same adapters asked again."""
    rows = home / "rows.jsonl"
    rows.write_bytes(b"".join(TRAINING.read_bytes().splitlines(keepends=True)[:8]))
    times: Times = {BESIDE: [], NEW: [], AGAIN: []}
    with running_service(Home(home / "new")) as client:
        wait_for_model(client, BASE)
        for seed in range(n_adapters):
            name = train(client, rows, seed)
            times[NEW].append(first_token_seconds(client, name))
            times[AGAIN].append(first_token_seconds(client, name))
            times[BESIDE].append(first_token_seconds(client, BASE))
    return times


def measure_at_rest(
    home: Path, n_adapters: int, n_turns: int = N_TURNS, rest_seconds: float = REST_SECONDS
) -> Times:
    """Return seconds to the first token: adapters in memory and in the store, the base beside."""
    kinds = (RESIDENT, RESIDENT_BASE, COLD, COLD_BASE, KNOWN, KNOWN_BASE)
    times: Times = {kind: [] for kind in kinds}
    service = Home(home / "rest")
    with running_service(service) as client:
        wait_for_model(client, BASE)
        names = [_publish(client, archive) for archive in _archives(home, n_adapters)]
        time.sleep(rest_seconds)
        for number in range(n_turns + 1):
            _take_turns(client, names[0], number, (times[RESIDENT], times[RESIDENT_BASE]))
    # To publish an adapter is to load it once.
    shutil.rmtree(service.path / "adapter-cache")
    with running_service(service) as client:
        wait_for_model(client, BASE)
        time.sleep(rest_seconds)
        for number, name in enumerate(names):
            if number % 4 < 2:  # so that each kind has both orders
                system = OWN_SYSTEM.format(number)
                _take_turns(client, name, number, (times[COLD], times[COLD_BASE]), system)
            else:
                _take_turns(client, name, number, (times[KNOWN], times[KNOWN_BASE]))
    # The first turn pays for what a server does once, such as importing what opens archives.
    return {what: seconds[1:] for what, seconds in times.items()}


def _take_turns(
    client: Client,
    adapter: str,
    number: int,
    times: tuple[list[float], list[float]],
    system: str = "",
) -> None:
    """Ask both the same; who is first changes with every turn, so that neither gains by it."""
    question = f"Berth {number} is taken. {QUESTION}"
    turn = list(zip((adapter, BASE), times, strict=True))
    for model, seconds in turn if number % 2 else reversed(turn):
        seconds.append(first_token_seconds(client, model, question, system))


def _archives(home: Path, n_adapters: int) -> list[Path]:
    # Not before: with torch loaded here, new adapters were 2.4 s later in the service beside it.
    from bench.serve import write_adapters
    from worker.base_models import materialise

    directory, _ = materialise(BASE, Settings().models)
    write_adapters(directory, home / "adapters", n_adapters)
    archives = []
    for folder in sorted((home / "adapters").iterdir()):
        archives.append(folder.with_suffix(".zip"))
        with zipfile.ZipFile(archives[-1], "w") as archive:
            for name in ADAPTER_FILES:
                archive.write(folder / name, name)
    return archives


def _publish(client: Client, archive: Path) -> str:
    return str(client.send_file("/adapters", archive, {"model": BASE, "suffix": ""})["id"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two adapters, and ten at rest")
    parser.add_argument("--rest", action="store_true", help="only what is measured at rest")
    parser.add_argument("--json", action="store_true", help="print the figures as a last line")
    return parser.parse_args()


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        times = {} if options.rest else measure_new(home, 2 if options.quick else 8)
        times |= measure_at_rest(home, *((10, 20) if options.quick else (24, N_TURNS)))
    table = Table("first token of", "median", "slowest", title=describe_machine())
    figures: dict[str, dict[str, float]] = {}
    for what, seconds in times.items():
        figures[what] = {"median_s": statistics.median(seconds), "max_s": max(seconds)}
        table.add_row(what, *(f"{figure:.3f} s" for figure in figures[what].values()))
    Console().print(table)
    for what, base in ((RESIDENT, RESIDENT_BASE), (COLD, COLD_BASE), (KNOWN, KNOWN_BASE)):
        more = [a - b for a, b in zip(times[what], times[base], strict=True)]
        low, middle, high = statistics.quantiles(more, n=4)
        figures[f"{what}, over base"] = {"median_s": middle, "q1_s": low, "q3_s": high}
        Console().print(
            f"{what}: {1000 * middle:.0f} ms after the base in {len(more)} pairs "
            f"(quartiles {1000 * low:.0f} and {1000 * high:.0f})"
        )
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
