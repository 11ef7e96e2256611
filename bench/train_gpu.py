"""Training on one GPU: a base of the shape of Llama 3.1 8B in NF4, beside TRL and Unsloth.

Random weights and random ids, in rows as long as those of real chats (59 % of the ids are trained);
LoRA of rank 16 on all linear layers; 64 rows an optimizer step. Each contestant is a process of its
own, one after another; two warm-up steps, then the median of the others. ``trl default`` is TRL as
it comes (8 rows × 8), ``trl best`` without activation checkpointing on batches of like lengths,
``unsloth`` the same through its own model. Padding is not counted as tokens. Needs a CUDA device,
``pip install trl``, and for its row ``pip install unsloth``, which may ask for other versions: with
``--unsloth-site FOLDER`` it gets packages of its own (``pip install --target FOLDER``).
``python -m bench.train_gpu [--quick] [--json] [--unsloth-site FOLDER]``
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import torch

from bench._train_gpu_worker import CONTESTANTS, QUICK_SHAPE, SHAPE

BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by the maker's data sheet."""


def flops_per_token(shape: dict[str, Any]) -> float:
    """Return 4 FLOP for each weight of a linear layer: forward, and gradient of the input."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    head = 0.59 * shape["vocab_size"] * hidden
    return 4.0 * (shape["num_hidden_layers"] * layer + head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four layers")
    parser.add_argument("--json", action="store_true", help="print the figures as a last line")
    parser.add_argument("--only", action="append", choices=CONTESTANTS)
    parser.add_argument("--unsloth-site", default="", help="packages that only Unsloth sees")
    options = parser.parse_args()
    shape = QUICK_SHAPE if options.quick else SHAPE
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    peak = next((each for key, each in BF16_PEAK.items() if key in figures["device"]), None)
    for name in options.only or CONTESTANTS:
        command = [sys.executable, "-m", "bench._train_gpu_worker", name]
        command += ["quick"] if options.quick else []
        sites = [os.environ.get("PYTHONPATH", "")]
        if name == "unsloth" and options.unsloth_site:
            sites.insert(0, options.unsloth_site)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, sites)),
        }
        with tempfile.TemporaryFile("w+") as log:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=240,
                check=False,
                env=environment,
            )
            log.seek(0)
            text = log.read()
        lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("@@")]
        if not lines:
            sys.stdout.write(f"{name} ended without figures:\n{text[-1500:]}\n")
            continue
        found = json.loads(lines[-1])
        rate = found["tokens_per_second"]
        share = f", {rate * flops_per_token(shape) / peak:.0%} of the bf16 peak" if peak else ""
        sys.stdout.write(
            f"{name}: {rate:,.0f} tokens/s, peak {found['peak_gib']:.1f} GiB{share}; "
            f"losses {found['losses'][:3]}\n"
        )
        sys.stdout.flush()
        figures[name.replace(" ", "_")] = found
        if name != "ours" and "ours" in figures:
            ratio = figures["ours"]["tokens_per_second"] / rate
            figures[f"vs_{name.replace(' ', '_')}"] = round(ratio, 2)
            sys.stdout.write(f"ours / {name}: {ratio:.2f} ×\n")
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
