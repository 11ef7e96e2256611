"""One contestant of ``bench.train``: a process that makes one optimizer step each time it is asked.

``python -m bench._train_worker CONTESTANT PRECISION FOLDER``: `bf16` or `nf4`, where the others
compute in bfloat16, `fp32` or `nf4_fp32`, where they compute in float32. The folder holds
``rows.json`` (ids and lengths of prompts, in order of training), ``init.safetensors`` (the adapter
that all start from) and ``base`` (the model). Each line of input asks for a step; each line of
output that starts with ``@@`` is the answer as JSON.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BATCH = 8
RANK, ALPHA, RATE = 16, 32.0, 2e-4
_answers = os.fdopen(os.dup(1), "w")


def say(**fields: Any) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    _answers.write(f"@@{json.dumps({**fields, 'rss': peak})}\n")
    _answers.flush()


def wait_for_turn() -> tuple[float, float]:
    """Return wall and processor time at the moment that a step is asked for."""
    if sys.stdin.readline().strip() != "step":
        os._exit(0)
    return time.perf_counter(), time.process_time()


class Rows:
    """The batches, the same for all: `order` is ``grouped`` (as we train) or ``random``."""

    def __init__(self, folder: Path, order: str) -> None:
        whole = json.loads((folder / "rows.json").read_text())
        self.rows: list[tuple[list[int], int]] = [tuple(row) for row in whole["rows"]]
        self.texts: list[tuple[str, str]] = [tuple(pair) for pair in whole["texts"]]
        self.batches: list[list[int]] = whole[order]

    def n_tokens(self, step: int) -> int:
        return sum(len(self.rows[row][0]) for row in self.batches[step % len(self.batches)])


def others_dtype(precision: str) -> torch.dtype:
    """Return what the contestants that are not ours compute in."""
    return torch.float32 if precision.endswith("fp32") else torch.bfloat16


def load_base(folder: Path, precision: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = others_dtype(precision)
    options: dict[str, Any] = {}
    if precision.startswith("nf4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype, **options)


def adapters_of(model: Any) -> dict[str, torch.nn.Parameter]:
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def copy_init(model: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    init = load_file(folder / "init.safetensors")
    with torch.no_grad():
        for name, parameter in adapters_of(model).items():
            parameter.copy_(init[name])


def peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def run_trl(folder: Path, precision: str, *, best: bool, turned: bool = False) -> None:
    """TRL's SFTTrainer: as it comes, or without checkpointing on batches of like lengths.

    With `turned`, the rows of each batch come the other way round.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = Rows(folder, "grouped" if best else "random")
    if turned:
        rows.batches = [batch[::-1] for batch in rows.batches]
    model = load_base(folder, precision)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": rows.texts[row][0]}],
                "completion": [{"role": "assistant", "content": rows.texts[row][1]}],
            }
            for batch in rows.batches
            for row in batch
        ]
    )

    class Turns(TrainerCallback):
        """Waits before every step and answers after its log."""

        turn = (0.0, 0.0)
        took = (0.0, 0.0)
        step = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.turn = wait_for_turn()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall, cpu = self.turn
            self.took = (time.perf_counter() - wall, time.process_time() - cpu)

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                wall, cpu = self.took
                n_tokens = rows.n_tokens(self.step)
                self.step += 1
                say(wall=wall, cpu=cpu, loss=float(logs["loss"]), tokens=n_tokens)

    checkpointing: dict[str, Any] = {"gradient_checkpointing": False} if best else {}
    options = SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=10_000,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=1,
        bf16=others_dtype(precision) == torch.bfloat16,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        max_length=None,
        train_sampling_strategy="sequential",
        **checkpointing,
    )
    trainer = SFTTrainer(
        model=model,
        args=options,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        callbacks=[Turns()],
        peft_config=peft_config(),
    )
    copy_init(trainer.model, folder)
    say(ready=True)
    trainer.train()


def run_plain(folder: Path, precision: str) -> None:
    """A loop of forty lines on transformers and peft: like lengths, logits at labels only."""
    from peft import get_peft_model
    from torch.nn import functional

    rows = Rows(folder, "grouped")
    model: Any = get_peft_model(load_base(folder, precision), peft_config())
    copy_init(model, folder)
    parameters = list(adapters_of(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    core = model.base_model.model
    model.train()
    say(ready=True)
    for step in forever():
        wall, cpu = wait_for_turn()
        batch = [rows.rows[row] for row in rows.batches[step % len(rows.batches)]]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.full((BATCH, longest), 2)
        mask = torch.zeros(BATCH, longest, dtype=torch.long)
        labels = torch.full((BATCH, longest), -100)
        for at, (row, n_prompt) in enumerate(batch):
            ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
            labels[at, n_prompt : len(row)] = ids[at, n_prompt : len(row)]
        dtype = others_dtype(precision)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            hidden = core.model(input_ids=ids, attention_mask=mask, use_cache=False)
            wanted = labels[:, 1:] != -100
            logits = core.lm_head(hidden.last_hidden_state[:, :-1][wanted]).float()
            loss = functional.cross_entropy(logits, labels[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(
            loss=float(loss.detach()),
            wall=time.perf_counter() - wall,
            cpu=time.process_time() - cpu,
            tokens=rows.n_tokens(step),
        )


def run_ours(folder: Path, precision: str) -> None:
    """The trainer of this project as a job runs it, with its own choice of forward pass."""
    from worker.training.loop import Trainer
    from worker.training.task import Stop

    rows = Rows(folder, "grouped")
    task = our_task(folder, precision, rows)
    trainer = Trainer(task)
    by_step = iter(rows.batches * 1000)
    trainer._batches = lambda epoch: [next(by_step)] * trainer.steps_per_epoch  # type: ignore[assignment]
    copy_init_ours(task.model, folder)

    class Turns:
        turn = (0.0, 0.0)
        is_ready = False

        def __call__(self) -> Stop | None:
            if not self.is_ready:
                self.is_ready = True
                say(ready=True)
            self.turn = wait_for_turn()
            return None

        def untrained(self, *_: Any) -> None:
            return

        def step(self, metrics: Any, *_: Any) -> None:
            wall, cpu = self.turn
            say(
                wall=time.perf_counter() - wall,
                cpu=time.process_time() - cpu,
                loss=metrics.train_loss,
                tokens=metrics.tokens,
            )

    turns = Turns()
    trainer.run(turns, lambda *_: None, turns)


def our_task(folder: Path, precision: str, rows: Rows) -> Any:
    import numpy as np

    from models.domain.training import TrainingSpec
    from worker.training import methods, objectives
    from worker.training.forward import choose_forward
    from worker.training.memory import can_cache_weights
    from worker.training.model import build_model
    from worker.training.objectives.base import Example
    from worker.training.task import Task

    spec = TrainingSpec.model_validate(
        {
            "model": "base",
            "training_file": "rows",
            "seed": 7,
            "hyperparameters": {
                "n_epochs": 50,
                "batch_size": BATCH,
                "learning_rate_multiplier": 1.0,
            },
            "objective": {"type": "sft"},
            "peft": {"type": "lora", "r": RANK, "alpha": ALPHA, "dropout": 0.0},
            "precision": {"type": precision.removesuffix("_fp32")},
            "optimizer": {"learning_rate": RATE, "schedule": "constant", "warmup_ratio": 0.0},
            "checkpoint_steps": 1_000_000,
        }
    )
    params = methods.parse_params(spec.peft)
    method = methods.get_method("lora")
    model = build_model(
        folder / "base", spec.precision, method, params, seed=spec.seed, device="cpu"
    )
    cache = can_cache_weights(model, "cpu")
    forward, reason = choose_forward(model, spec.precision, "cpu", 2, cache_weights=cache)
    if reason is not None:
        raise SystemExit(reason)
    examples = [
        Example(
            line,
            np.array(ids, np.int32),
            np.arange(len(ids)) >= n_prompt,
            len(ids) - n_prompt,
        )
        for line, (ids, n_prompt) in enumerate(rows.rows, 1)
    ]
    return Task(
        model=model,
        forward=forward,
        method=method,
        method_params=params,
        objective=objectives.get_objective("sft"),
        objective_params=objectives.parse_params(spec.objective),
        spec=spec,
        train=examples,
        valid=(),
        device="cpu",
    )


def copy_init_ours(model: Any, folder: Path) -> None:
    """Start from the shared adapter; the first of us makes it."""
    from safetensors.torch import save_file

    file = folder / "init.safetensors"
    if not file.exists():
        tensors = {name: each.detach().clone() for name, each in adapters_of(model).items()}
        save_file(tensors, file)
    copy_init(model, folder)


def forever() -> Iterator[int]:
    step = 0
    while True:
        yield step
        step += 1


def main() -> None:
    sys.stdout = sys.stderr
    contestant, precision, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.manual_seed(0)
    match contestant:
        case "ours":
            run_ours(folder, precision)
        case "plain":
            run_plain(folder, precision)
        case "exact":  # on the same weights, with none of their roundings
            run_plain(folder, "fp32")
        case "trl default":
            run_trl(folder, precision, best=False)
        case "trl best" | "trl turned":
            run_trl(folder, precision, best=True, turned=contestant == "trl turned")
        case _:
            raise SystemExit(f"There is no contestant {contestant!r}.")


if __name__ == "__main__":
    main()
