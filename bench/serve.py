"""Output tokens a second, first token and gaps: base and 1, 8, 16 adapters at 8 and 16 streams.

Asks the engine itself with SmolLM2 in bfloat16 and random adapters of rank 16 on all linear layers
(where a processor makes no products in bfloat16, as an inference server does there); each request
has about 93 prompt and 48 output tokens, greedy, no end token. Then: 1,000 registered adapters of
which 100 are asked for, over 16 slots, each loaded from the disk when its first request comes, with
8 adapters at 16 streams directly before and after, whose mean rate it is compared with (a machine's
speed drifts); and peft's own ways, one ``generate`` with ``adapter_names`` and one request after
the other with ``set_adapter``.

``--peer URL --peer-models A,B`` sends the same load to any OpenAI-compatible server (its models:
the base first, then adapters). ``--quick`` asks for 24 tokens after 47 and leaves out loads.
``python -m bench.serve [--quick] [--json]``
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from bench._report import describe_machine, print_figures
from bench._serve_peft import PeftLoops
from models.settings import Settings
from worker.base_models import compute_dtype, load_model, load_tokenizer, materialise
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.errors import EngineError
from worker.inference.engine.params import Sampling, TokenEvent
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.scheduler import Limits
from worker.inference.own_model import lighten_
from worker.threads import in_passing_thread

BASE = "smollm2-135m-instruct"
RANK = 16
N_SLOTS = 16
N_REGISTERED, N_ACTIVE = 1000, 100
SENTENCE = "The harbour office opens at seven and closes when the last ferry has come in. "

Ask = Callable[[int], list[float]]
"""Sends request number i and returns the times (`time.perf_counter`) at which tokens came."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a request is: how often `SENTENCE` is in its prompt, and how many tokens it gets."""

    n_sentences: int = 5
    output_tokens: int = 48

    def prompt(self, index: int) -> str:
        return f"Note {index}. " + SENTENCE * self.n_sentences + "In short:"


QUICK = Size(2, 24)


@dataclass(frozen=True, slots=True)
class Figures:
    """One load: output tokens a second, and seconds to the first token and between tokens.

    Of a way that gives no token before the last one there is the rate alone.
    """

    tokens_per_s: float
    first_p50_s: float = math.nan
    first_p99_s: float = math.nan
    gap_p50_s: float = math.nan
    gap_p99_s: float = math.nan
    first_max_s: float = math.nan


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
        max(firsts),
    )


class Ours:
    """The engine in this process, with random adapters in `folder`, some of them in memory.

    `N_REGISTERED` names stand for `N_SLOTS` sets of weights: to the engine each is another adapter.
    """

    def __init__(self, folder: Path, size: Size) -> None:
        directory, _ = materialise(BASE, Settings().models)
        self.directory = directory
        self.tokenizer = load_tokenizer(directory)
        self._size = size
        self._folder = folder
        write_adapters(directory, folder, N_SLOTS)
        for index in range(N_SLOTS, N_REGISTERED):
            (folder / str(index)).symlink_to(folder / str(index % N_SLOTS))
        # Every token is one character, so that each makes an event at once.
        model = load_model(directory, precision="bf16")
        lighten_(model, "bf16", "cpu")
        self.engine = BatchingEngine(
            model,
            lambda ids: "x" * len(ids),
            [],
            limits=Limits(n_slots=N_SLOTS),
        )
        self._leases = [self._load(index) for index in range(N_SLOTS)]
        self._loading = [Lock() for _ in range(N_REGISTERED)]

    def _load(self, index: int) -> AdapterLease:
        return self.engine.load(str(index), self._folder / str(index))

    def asking(self, n_adapters: int) -> Ask:
        """Return what asks the first `n_adapters` in turn, or the base for 0."""

        def ask(index: int) -> list[float]:
            lease = self._leases[index % n_adapters] if n_adapters else None
            return self._times(index, lease)

        return ask

    def ask_any(self, index: int) -> list[float]:
        """Ask one of `N_ACTIVE` of the registered adapters, loading it where it is not there."""
        number = index * 7 % N_ACTIVE * (N_REGISTERED // N_ACTIVE) + 1
        with self._loading[number]:
            lease = self.engine.acquire(str(number)) or self._load(number)
        with lease:
            return self._times(index, lease)

    def _times(self, index: int, lease: AdapterLease | None) -> list[float]:
        prompt = tuple(self.tokenizer.encode(self._size.prompt(index)))
        sampling = Sampling(self._size.output_tokens, temperature=0)
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


def write_adapters(base: Path, folder: Path, n_adapters: int) -> None:
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


def peer(url: str, models: Sequence[str], size: Size) -> Callable[[int], Ask]:
    """Return what asks the first n adapters of an OpenAI-compatible server, or its base for 0."""
    client = OpenAI(base_url=url, api_key="none")

    def asking(n_adapters: int) -> Ask:
        names = models[1 : n_adapters + 1] if n_adapters else models[:1]

        def ask(index: int) -> list[float]:
            stream = client.completions.create(
                model=names[index % len(names)],
                prompt=size.prompt(index),
                max_tokens=size.output_tokens,
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


Results = dict[tuple[str, int, int], Figures]
"""By side, number of adapters and number of streams."""


def main() -> None:
    options = _options()
    names = [name for name in options.peer_models.split(",") if name]
    if options.peer and len(names) < 2:
        raise SystemExit("--peer needs --peer-models: its base model, then at least one adapter.")
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), options.peer, names, quick=options.quick)
    dtype = str(compute_dtype("cpu")).removeprefix("torch.")
    table = Table("side", "adapters", "streams", "tokens/s", title=f"{describe_machine()}, {dtype}")
    for heading in ("first p50, s", "first p99, s", "first max, s", "gap p50, s", "gap p99, s"):
        table.add_column(heading)
    for (side, n_adapters, n_streams), f in results.items():
        seconds = (f.first_p50_s, f.first_p99_s, f.first_max_s, f.gap_p50_s, f.gap_p99_s)
        cells = ["" if math.isnan(value) else f"{value:.3f}" for value in seconds]
        table.add_row(side, str(n_adapters), str(n_streams), f"{f.tokens_per_s:.0f}", *cells)
    Console().print(table)
    if options.json:
        print_figures(ratios(results))


def run(folder: Path, peer_url: str | None, peer_models: Sequence[str], *, quick: bool) -> Results:
    """Measure all loads."""
    size = QUICK if quick else Size()
    loads = [(n, s) for n in (0, 1, 8, 16) for s in ((8,) if quick else (8, 16))]
    results: Results = {}
    ours = in_passing_thread(lambda: Ours(folder, size))
    sides: dict[str, Callable[[int], Ask]] = {"ours": ours.asking}
    if peer_url:
        sides["peer"] = peer(peer_url, peer_models, size)
    for n_adapters, n_streams in loads:
        for side, asking in sides.items():
            if side == "peer" and n_adapters >= len(peer_models):
                continue
            n_requests = n_streams if quick else 4 * n_streams
            measure(asking(n_adapters), min(4, n_requests), 4)
            figures = measure(asking(n_adapters), n_requests, n_streams)
            results[side, n_adapters, n_streams] = figures
    n_beside = N_SLOTS if quick else 4 * N_SLOTS
    n_requests = N_ACTIVE if quick else 3 * N_ACTIVE
    results[BEFORE, 8, N_SLOTS] = measure(ours.asking(8), n_beside, N_SLOTS)
    results[ANY, N_ACTIVE, N_SLOTS] = measure(ours.ask_any, n_requests, N_SLOTS)
    results[AFTER, 8, N_SLOTS] = measure(ours.asking(8), n_beside, N_SLOTS)
    ours.engine.close()
    prompts = [size.prompt(index) for index in range(8)]
    loops = PeftLoops(
        load_model(ours.directory, precision="bf16"),
        ours.tokenizer,
        [folder / str(index) for index in range(8)],
        size.output_tokens,
    )
    results["peft, adapter_names", 8, 8] = Figures(loops.mixed(prompts))
    results["peft, set_adapter", 8, 1] = Figures(loops.in_turn(prompts))
    return results


ANY = f"ours, {N_REGISTERED} registered"
BEFORE, AFTER = "ours, before", "ours, after"


def ratios(results: Results) -> dict[str, float]:
    """Return tokens/s of ours over others', at 8 streams, and the longest wait of any request.

    Those of 100 of 1,000 adapters are over the mean of 8 adapters at 16 streams before and after.
    """
    ours = {n: ("ours", n, 8) for n in (0, 8, 16)}
    wanted = {
        "base_vs_vllm": (ours[0], ("peer", 0, 8)),
        "adapters8_vs_vllm": (ours[8], ("peer", 8, 8)),
        "adapters16_vs_vllm": (ours[16], ("peer", 16, 8)),
        "adapters8_vs_own_base": (ours[8], ours[0]),
        "adapters16_vs_own_base": (ours[16], ours[0]),
        "adapters8_vs_peft_adapter_names": (ours[8], ("peft, adapter_names", 8, 8)),
        "adapters8_vs_peft_set_adapter": (ours[8], ("peft, set_adapter", 8, 1)),
    }
    found = {
        key: results[mine].tokens_per_s / results[other].tokens_per_s
        for key, (mine, other) in wanted.items()
        if mine in results and other in results
    }
    active = results[ANY, N_ACTIVE, N_SLOTS]
    beside = statistics.mean(results[side, 8, N_SLOTS].tokens_per_s for side in (BEFORE, AFTER))
    return found | {
        "active100_vs_adapters8": active.tokens_per_s / beside,
        "active100_max_wait_s": active.first_max_s,
    }


if __name__ == "__main__":
    main()
