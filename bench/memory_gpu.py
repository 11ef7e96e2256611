"""Memory on one GPU: full fine-tuning, LoRA and QLoRA of one shape, plain and paged optimizers.

A random Llama of 1.2 B parameters, 16 rows of 512 ids a step in micro-batches of 4,096 tokens; each
in a process of its own, five steps. Needs a CUDA device.
``python -m bench.memory_gpu [--quick] [--json]``
"""

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from bench._report import parse_options, print_figures
from bench._train_gpu_worker import SHAPE, build_base, build_plain_base

SMALL = {
    **SHAPE,
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
}
CASES = (
    ("full", "bf16", "adamw"),
    ("full", "bf16", "paged_adamw_8bit"),
    ("lora", "bf16", "adamw"),
    ("lora", "nf4", "adamw"),
    ("lora", "nf4", "paged_adamw_8bit"),
)
N_STEPS, BATCH, LENGTH, BUDGET = 5, 16, 512, 4096


def run(method_name: str, precision: str, optimizer: str) -> None:
    from models.domain.training import TrainingSpec
    from worker.training import methods, objectives
    from worker.training.forward import choose_forward
    from worker.training.loop import Trainer
    from worker.training.model import adapt
    from worker.training.objectives.base import Example
    from worker.training.task import Task

    spec = TrainingSpec.model_validate(
        {
            "model": "base",
            "training_file": "rows",
            "seed": 7,
            "hyperparameters": {
                "n_epochs": 1,
                "batch_size": BATCH,
                "learning_rate_multiplier": 1.0,
            },
            "objective": {"type": "sft"},
            "peft": {"type": method_name},
            "precision": {"type": precision},
            "optimizer": {"type": optimizer, "learning_rate": 1e-5},
            "checkpoint_steps": 1_000_000,
        }
    )
    params = methods.parse_params(spec.peft)
    method = methods.get_method(method_name)
    base = build_base(SMALL) if precision == "nf4" else build_plain_base(SMALL)
    torch.cuda.reset_peak_memory_stats()
    model = adapt(base, method, params, spec.seed)
    forward, reason = choose_forward(model, spec.precision, "cuda:0", 2, cache_weights=False)
    draw = np.random.default_rng(7)
    rows = [
        Example(
            line,
            draw.integers(1000, 30000, LENGTH).astype(np.int32),
            np.arange(LENGTH) >= LENGTH // 2,
            LENGTH // 2,
        )
        for line in range(1, BATCH * N_STEPS + 1)
    ]
    objective, objective_params = objectives.resolve(spec.objective)
    task = Task(
        model=model,
        forward=method.wrap_forward(model, forward, params),
        method=method,
        method_params=params,
        objective=objective,
        objective_params=objective_params,
        spec=spec,
        train=rows,
        valid=(),
        device="cuda:0",
    )
    trainer = Trainer(task, token_budget=BUDGET)
    seconds = []
    for _ in range(N_STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        trainer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    figures = {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "tokens_per_second": BATCH * LENGTH / statistics.median(seconds[1:]),
        "trainable": sum(each.numel() for each in trainer.parameters.values()),
        "padded_because": reason,
    }
    sys.stdout.write(f"@@{json.dumps(figures)}\n")


def main() -> None:
    if len(sys.argv) == 4:
        run(*sys.argv[1:])
        return
    options = parse_options(__doc__)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for case in CASES[2:] if options.quick else CASES:
        command = [sys.executable, "-m", "bench.memory_gpu", *case]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("@@")]
        if not lines:
            sys.stdout.write(f"{case} ended without figures:\n{done.stderr[-1500:]}\n")
            continue
        figures = json.loads(lines[-1])
        found[" ".join(case)] = figures
        sys.stdout.write(
            f"{' '.join(case):32} peak {figures['peak_gib']:5.1f} GiB, "
            f"{figures['tokens_per_second']:,.0f} tokens/s, "
            f"{figures['trainable'] / 1e6:,.1f} M trainable\n"
        )
    if options.json:
        print_figures(found)


if __name__ == "__main__":
    main()
