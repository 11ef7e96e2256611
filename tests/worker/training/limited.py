"""``python -m tests.worker.training.limited MEGABYTES``: train under a real limit of the kernel.

Prints the losses of the steps and the warnings as JSON. The limit is on the address space beyond
what the process has when the model stands; 0 sets none.
"""

import json
import resource
import sys
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.worker.training.tiny import make_examples, make_spec, make_trainer


def main() -> None:
    megabytes = int(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    numbers = {"n_epochs": 1, "batch_size": 64, "learning_rate_multiplier": 1.0}
    warnings: list[str] = []
    trainer = make_trainer(
        make_spec(hyperparameters=numbers),
        model=LlamaForCausalLM(config).eval(),
        train=make_examples(128),
        warn=warnings.append,
    )
    losses: list[float] = []

    class Reporter:
        def untrained(self, *_: Any) -> None:
            return

        def step(self, metrics: Any, *_: Any) -> None:
            losses.append(metrics.train_loss)

    if megabytes:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
    trainer.run(Reporter(), lambda *_: None, lambda: None)
    sys.stdout.write(json.dumps({"losses": losses, "warnings": warnings}))


if __name__ == "__main__":
    main()
