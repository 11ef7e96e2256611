"""Serving on one GPU: adapters of rank 16 in one batch over a base of the shape of Llama 3.1 8B.

Random weights in bfloat16, 32 streams, 96 prompt and 64 output tokens, greedy; the base alone, then
8 and 32 adapters by turns; each pass told kernel by kernel, then steps of decoding as CUDA graphs.
Needs a CUDA device. ``python -m bench.serve_gpu [--quick] [--json] [--nf4]``
"""

import gc
import sys
import tempfile
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from bench._report import parse_options, print_figures
from bench._train_gpu_worker import (
    PROJECTIONS,
    QUICK_SHAPE,
    RANK,
    SHAPE,
    build_base,
    build_plain_base,
)
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.graphs import CudaRecord
from worker.inference.engine.params import Sampling
from worker.inference.engine.scheduler import Limits

N_STREAMS, PROMPT, OUTPUT = 32, 96, 64


def write_adapter(model: Any, folder: Path) -> None:
    """Write one adapter of small random weights; all digests of the bench are this one."""
    import json

    from safetensors.torch import save_file

    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path.rpartition(".")[2] in PROJECTIONS:
            name = f"base_model.model.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, module.in_features) * 0.01
            tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": PROJECTIONS,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def rate(engine: BatchingEngine, leases: list[Any]) -> float:
    """Return output tokens a second of all streams, from the first token of the last prompt on."""
    draw = torch.Generator().manual_seed(len(leases))
    ends: SimpleQueue[Any] = SimpleQueue()
    times: list[list[float]] = [[] for _ in range(N_STREAMS)]

    def emit_to(stream: int) -> Any:
        def emit(_: int, event: Any) -> None:
            times[stream].append(time.perf_counter())
            if isinstance(event, Exception) or event.finish_reason is not None:
                ends.put(event)

        return emit

    for stream in range(N_STREAMS):
        prompt = tuple(torch.randint(1000, 30000, (PROMPT,), generator=draw).tolist())
        lease = leases[stream % len(leases)] if leases else None
        sampling = Sampling(OUTPUT, temperature=0, ignore_eos=True)
        engine.submit(Request(prompt, sampling, lease=lease), emit_to(stream))
    for _ in range(N_STREAMS):
        if isinstance(event := ends.get(timeout=120), Exception):
            raise event
    started = max(each[0] for each in times)
    n_tokens = sum(1 for each in times for at in each if at > started)
    return n_tokens / (max(each[-1] for each in times) - started)


def measure(model: Any, folder: Path, *, with_graphs: bool) -> dict[str, float]:
    """Return the rates of the base and of 8 and 32 adapters, and print them."""
    limits = Limits(
        max_running=N_STREAMS, n_slots=N_STREAMS, prefix_tokens=0, adapter_bytes=64 * 2**30
    )
    record = CudaRecord("cuda") if with_graphs else None
    engine = BatchingEngine(model, lambda ids: "x" * len(ids), [], limits=limits, record=record)
    leases = [engine.load(f"{index:064x}", folder) for index in range(N_STREAMS)]
    name = "graphs" if with_graphs else "no_graphs"
    found: dict[str, float] = {}
    try:
        for n in (0, 8, 32):
            rate(engine, leases[:n])  # warm
            found[f"{name}_adapters{n}"] = round(rate(engine, leases[:n]), 1)
            share = found[f"{name}_adapters{n}"] / found[f"{name}_adapters0"]
            sys.stdout.write(
                f"{name}, {n:2} adapters: {found[f'{name}_adapters{n}']:,.0f} tokens/s, "
                f"{share:.2f} × base\n"
            )
            sys.stdout.flush()
    finally:
        for lease in leases:
            lease.release()
        engine.close()
    return found


def main() -> None:
    options = parse_options(__doc__, nf4="hold the base in NF4")
    build = build_base if options.nf4 else build_plain_base
    shape = QUICK_SHAPE if options.quick else SHAPE
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as name:
        model = build(shape)
        write_adapter(model, Path(name))
        figures |= measure(model, Path(name), with_graphs=False)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        figures |= measure(build(shape), Path(name), with_graphs=True)
    if options.json:
        print_figures(figures)


if __name__ == "__main__":
    main()
