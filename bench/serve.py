"""Output tokens a second, first token and gaps: base and 1, 8, 16 adapters at 8 and 16 streams.

Asks the engine itself with SmolLM2 in bfloat16 and random adapters of rank 16 on all linear
layers; each request has about 93 prompt and 48 output tokens, greedy, no
end token. ``--peer URL --peer-models A,B`` sends the same load to any OpenAI-compatible server
(its models: the base first, then adapters). ``python -m bench.serve [--quick] [--json]``
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from bench._report import describe_machine, print_figures
from models.settings import Settings
from worker.base_models import load_model, load_tokenizer, materialise
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.errors import EngineError
from worker.inference.engine.params import Sampling, TokenEvent
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.scheduler import Limits

BASE = "smollm2-135m-instruct"
RANK = 16
OUTPUT_TOKENS = 48
SENTENCE = "The harbour office opens at seven and closes when the last ferry has come in. "

Ask = Callable[[int], list[float]]
"""Sends request number i and returns the times (`time.perf_counter`) at which tokens came."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One load: output tokens a second, and seconds to the first token and between tokens."""

    tokens_per_s: float
    first_p50_s: float
    first_p99_s: float
    gap_p50_s: float
    gap_p99_s: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of `values`."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def measure(ask: Ask, n_requests: int, n_streams: int) -> Figures:
    """Send `n_requests`, `n_streams` at a time, and return what was seen."""
    firsts: list[float] = []
    gaps: list[float] = []

    def one(index: int) -> int:
        started = time.perf_counter()
        times = ask(index)
        firsts.append(times[0] - started)
        gaps.extend(b - a for a, b in pairwise(times))
        return len(times)

    started = time.perf_counter()
    with ThreadPoolExecutor(n_streams) as pool:
        n_tokens = sum(pool.map(one, range(n_requests)))
    seconds = time.perf_counter() - started
    return Figures(
        n_tokens / seconds,
        statistics.median(firsts),
        percentile(firsts, 99),
        statistics.median(gaps),
        percentile(gaps, 99),
    )


def prompt_text(index: int) -> str:
    return f"Note {index}. " + SENTENCE * 5 + "In short:"


class Ours:
    """The engine in this process, with `n_adapters` random adapters in memory."""

    def __init__(self, folder: Path, n_adapters: int) -> None:
        directory, _ = materialise(BASE, Settings().models)
        self._tokenizer = load_tokenizer(directory)
        _write_adapters(directory, folder, n_adapters)
        # Every token is one character, so that each makes an event at once.
        self.engine = BatchingEngine(
            load_model(directory, precision="bf16"),
            lambda ids: "x" * len(ids),
            [],
            limits=Limits(n_slots=16),
        )
        self._leases = [
            self.engine.load(str(index), folder / str(index)) for index in range(n_adapters)
        ]

    def asking(self, n_adapters: int) -> Ask:
        """Return what asks the first `n_adapters` in turn, or the base for 0."""

        def ask(index: int) -> list[float]:
            lease = self._leases[index % n_adapters] if n_adapters else None
            return self._times(index, lease)

        return ask

    def _times(self, index: int, lease: AdapterLease | None) -> list[float]:
        prompt = tuple(self._tokenizer.encode(prompt_text(index)))
        sampling = Sampling(OUTPUT_TOKENS, temperature=0)
        events: SimpleQueue[TokenEvent | EngineError] = SimpleQueue()
        self.engine.submit(
            Request(prompt, sampling, lease=lease), lambda _, event: events.put(event)
        )
        times = []
        while True:
            event = events.get()
            times.append(time.perf_counter())
            if isinstance(event, EngineError):
                raise event
            if event.finish_reason is not None:
                return times


def _write_adapters(base: Path, folder: Path, n_adapters: int) -> None:
    """Write adapters of random weights, so small that the answers stay text."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(load_model(base, precision="bf16"), config)
    torch.manual_seed(0)
    for index in range(n_adapters):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.01)
        model.save_pretrained(str(folder / str(index)))


def peer(url: str, models: Sequence[str]) -> Callable[[int], Ask]:
    """Return what asks the first n adapters of an OpenAI-compatible server, or its base for 0."""
    client = OpenAI(base_url=url, api_key="none")

    def asking(n_adapters: int) -> Ask:
        names = models[1 : n_adapters + 1] if n_adapters else models[:1]

        def ask(index: int) -> list[float]:
            stream = client.completions.create(
                model=names[index % len(names)],
                prompt=prompt_text(index),
                max_tokens=OUTPUT_TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            return [time.perf_counter() for chunk in stream if chunk.choices]

        return ask

    return asking


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run, at most a minute")
    parser.add_argument("--json", action="store_true", help="print the figures as a last line")
    parser.add_argument("--peer", metavar="URL", help="an OpenAI-compatible server, /v1 included")
    parser.add_argument("--peer-models", default="", help="its base model, then its adapters")
    return parser.parse_args()


def main() -> None:
    options = _options()
    loads = [(n, s) for n in (0, 1, 8, 16) for s in (8, 16)]
    if options.quick:
        loads = [(0, 8), (1, 8), (8, 8)]
    names = [name for name in options.peer_models.split(",") if name]
    if options.peer and len(names) < 2:
        raise SystemExit("--peer needs --peer-models: its base model, then at least one adapter.")
    results: dict[tuple[str, int, int], Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(Path(folder), max(n for n, _ in loads))
        sides: dict[str, Callable[[int], Ask]] = {"ours": ours.asking}
        if options.peer:
            sides["peer"] = peer(options.peer, names)
        for n_adapters, n_streams in loads:
            for side, asking in sides.items():
                if side == "peer" and n_adapters >= len(names):
                    continue
                n_requests = n_streams if options.quick else 4 * n_streams
                measure(asking(n_adapters), min(4, n_requests), 4)
                figures = measure(asking(n_adapters), n_requests, n_streams)
                results[side, n_adapters, n_streams] = figures
        ours.engine.close()
    table = Table("side", "adapters", "streams", "tokens/s", title=describe_machine())
    for heading in ("first p50, s", "first p99, s", "gap p50, s", "gap p99, s"):
        table.add_column(heading)
    for (side, n_adapters, n_streams), f in results.items():
        seconds = (f.first_p50_s, f.first_p99_s, f.gap_p50_s, f.gap_p99_s)
        cells = [f"{value:.3f}" for value in seconds]
        table.add_row(side, str(n_adapters), str(n_streams), f"{f.tokens_per_s:.0f}", *cells)
    Console().print(table)
    if options.json:
        print_figures(ratios(results))


def ratios(results: dict[tuple[str, int, int], Figures]) -> dict[str, float]:
    """Return tokens/s of ours over the peer's and over our own base, at 8 streams."""
    wanted = {
        "base_vs_vllm": (0, ("peer", 0, 8)),
        "adapters8_vs_vllm": (8, ("peer", 8, 8)),
        "adapters16_vs_vllm": (16, ("peer", 16, 8)),
        "adapters8_vs_own_base": (8, ("ours", 0, 8)),
    }
    return {
        key: results["ours", n_adapters, 8].tokens_per_s / results[other].tokens_per_s
        for key, (n_adapters, other) in wanted.items()
        if other in results
    }


if __name__ == "__main__":
    main()
