"""Tiny random models and made-up rows: real architectures, in milliseconds."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from models.domain.reports import StepMetrics
from models.domain.training import TrainingSpec
from worker.training import methods, objectives
from worker.training.forward import PackedForward, PaddedForward, choose_forward
from worker.training.loop import Trainer
from worker.training.methods.base import DEFAULT_ADAPTER
from worker.training.objectives.base import Example, LanguageForward
from worker.training.task import Task

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Enough for a model of any family."""


def tiny_llama(
    vocab_size: int = VOCABULARY,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **changes: Any,
) -> LlamaForCausalLM:
    """A random two-layer Llama; the same weights on every call."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    prepared: LlamaForCausalLM = model.to(device, dtype).eval().requires_grad_(False)
    return prepared


def save_base(directory: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Path:
    """Write a tiny base model that speaks through `tokenizer`, for ``path:`` in the catalog."""
    tiny_llama(len(tokenizer), **changes).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_spec(**changes: Any) -> TrainingSpec:
    """A resolved specification in float32 without dropout: 8 rows are two steps an epoch."""
    fields: dict[str, Any] = {
        "model": "tiny",
        "training_file": "file-train",
        "seed": 7,
        "hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0},
        "objective": objectives.parse_params({"type": "sft"}).model_dump(),
        "peft": methods.parse_params({"type": "lora", "r": 4, "dropout": 0.0}).model_dump(),
        "precision": {"type": "fp32"},
        "optimizer": {"learning_rate": 0.01},
        "max_seq_length": 128,
        "checkpoint_steps": 1000,
    }
    return TrainingSpec.model_validate({**fields, **changes})


def lora(**changes: Any) -> dict[str, Any]:
    return methods.parse_params({"type": "lora", "r": 4, "dropout": 0.0, **changes}).model_dump()


def make_examples(n_rows: int, *, seed: int = 0, vocab_size: int = VOCABULARY) -> list[Example]:
    """Rows of 6 to 25 ids that count upwards from a random start; the second half is trained."""
    generator = np.random.default_rng(seed)
    examples = []
    for line in range(1, n_rows + 1):
        n_ids = int(generator.integers(6, 26))
        ids = (np.arange(n_ids) + generator.integers(vocab_size)) % vocab_size
        trained = np.arange(n_ids) >= n_ids // 2
        examples.append(Example(line, ids.astype(np.int32), trained, int(trained.sum())))
    return examples


def attach(
    model: LlamaForCausalLM | PeftModel,
    peft: dict[str, Any],
    seed: int = 7,
    adapter: str = DEFAULT_ADAPTER,
) -> PeftModel:
    method = methods.get_method(peft["type"])
    return method.attach(model, methods.parse_params(peft), seed, adapter)


def make_trainer(
    spec: TrainingSpec | None = None,
    *,
    train: Sequence[Example] | None = None,
    valid: Sequence[Example] = (),
    model: LlamaForCausalLM | None = None,
    padded: bool = False,
    **options: Any,
) -> Trainer:
    """`options` are the trainer's own: `token_budget`, `warn`."""
    spec = spec or make_spec()
    adapted = attach(model or tiny_llama(), spec.peft, spec.seed)
    if padded:
        forward: LanguageForward = PaddedForward(adapted, spec.precision, device_of(adapted), 0)
    else:
        forward, reason = choose_forward(
            adapted, spec.precision, device_of(adapted), 0, cache_weights=False
        )
        assert reason is None
    task = make_task(adapted, forward, spec, train=train, valid=valid)
    return Trainer(task, **options)


def make_task(
    model: PeftModel,
    forward: LanguageForward,
    spec: TrainingSpec,
    *,
    train: Sequence[Example] | None = None,
    valid: Sequence[Example] = (),
    adapter: str = DEFAULT_ADAPTER,
) -> Task:
    method, params = methods.get_method(spec.peft["type"]), methods.parse_params(spec.peft)
    return Task(
        model=model,
        forward=method.wrap_forward(model, forward, params),
        method=method,
        method_params=params,
        objective=objectives.get_objective(spec.objective["type"]),
        objective_params=objectives.parse_params(spec.objective),
        spec=spec,
        train=make_examples(8) if train is None else train,
        valid=valid,
        device=device_of(model),
        adapter=adapter,
    )


def device_of(model: PeftModel) -> str:
    return str(model.device)


def make_trainers_on_one_base(
    jobs: Sequence[tuple[TrainingSpec, Sequence[Example]]],
    model: LlamaForCausalLM | None = None,
    **options: Any,
) -> list[Trainer]:
    """One trainer for each specification and its rows, with adapters ``job0``, ``job1``, …"""
    adapted: LlamaForCausalLM | PeftModel = model or tiny_llama()
    for index, (spec, _) in enumerate(jobs):
        adapted = attach(adapted, spec.peft, spec.seed, f"job{index}")
    assert isinstance(adapted, PeftModel)
    forward, reason = choose_forward(
        adapted, jobs[0][0].precision, device_of(adapted), 0, cache_weights=False
    )
    assert reason is None
    assert isinstance(forward, PackedForward)
    return [
        Trainer(
            make_task(
                adapted,
                forward.for_adapter(f"job{index}"),
                spec,
                train=train,
                valid=train[:2],
                adapter=f"job{index}",
            ),
            **options,
        )
        for index, (spec, train) in enumerate(jobs)
    ]


class Losses(list[float]):
    """A reporter that keeps the loss of each step."""

    def untrained(self, *_: Any) -> None:
        return

    def step(self, metrics: StepMetrics, *_: Any) -> None:
        self.append(metrics.train_loss)


ADAPTER_PARTS = (
    ".meft_",
    ".lora_",
    ".ia3_",
    ".own_",
    "prompt_encoder.",
    ".vera_",
    ".oft_",
    ".hada_",
    ".lokr_",
    ".randlora_",
    ".miss_",
)
"""What names of adapters' tensors have in them."""


def digest_of_base(model: PeftModel) -> str:
    """A sha256 over every frozen tensor, quantisation constants included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not any(own in name for own in ADAPTER_PARTS):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
