"""Tiny random encoders and seq2seq models without a head of their own, on disk, and their rows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.worker.training.tiny import SIZES, make_spec
from worker.base_models import load_model
from worker.heads import Head
from worker.training import methods, objectives
from worker.training.checkpoint import seed_everything
from worker.training.headed import headed_forward
from worker.training.loop import Trainer
from worker.training.model import adapt
from worker.training.objectives.base import Example
from worker.training.task import Task

ENCODERS = ("bert", "deberta-v2", "distilbert", "modernbert", "roberta")
SEQ2SEQ = ("bart", "t5")
MASK_ID = 4
_SPECIAL = {"cls_token_id": 1, "sep_token_id": 2, "initializer_range": 0.2}
_CONFIGS: dict[str, dict[str, Any]] = {
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    },
    "t5": {
        "d_model": 32,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "d_kv": 8,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "init_std": 0.2,
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
    },
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mlm": {"mask_probability": 0.3, "mask_token_id": MASK_ID},
    "classification": {"labels": ["a", "b", "c"]},
    "token_classification": {"labels": ["even", "odd"]},
    "embedding": {},
    "seq2seq": {},
}


def config_of(family: str, **changes: Any) -> Any:
    """The configuration of a tiny encoder or seq2seq model."""
    sizes = {**SIZES, **_SPECIAL} if family not in _CONFIGS else {"vocab_size": 97}
    sizes |= _CONFIGS.get(family, {}) | {"max_position_embeddings": 128} | changes
    return transformers.AutoConfig.for_model(family, **sizes)


def save_encoder(directory: Path, family: str, **changes: Any) -> Path:
    """Write a tiny base model that has no head (of seq2seq families: its own)."""
    config = config_of(family, **changes)
    kind = "AutoModelForSeq2SeqLM" if family in SEQ2SEQ else "AutoModel"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, kind).from_config(config).save_pretrained(directory)
    return directory


def rows_for(name: str, n_rows: int = 8) -> list[Example]:
    """Rows that a tiny model can learn: ids that count upwards tell their labels."""
    generator = np.random.default_rng(0)
    rows = []
    for line in range(1, n_rows + 1):
        n_ids = int(generator.integers(5, 9))
        start = int(generator.integers(10, 80))
        ids = np.array([1, *range(start, start + n_ids), 2], np.int32)
        inner = (ids != 1) & (ids != 2)
        match name:
            case "mlm":
                n_masked = max(1, round(0.3 * n_ids))
                rows.append(Example(line, ids, inner, n_masked))
            case "classification":
                label = np.array([float(line % 3)])
                ids[1] = 90 + line % 3
                rows.append(Example(line, ids, inner, 1, labels=label))
            case "token_classification":
                labels = np.where(inner, ids % 2, -1).astype(np.float64)
                rows.append(Example(line, ids, inner, n_ids, labels=labels))
            case "embedding" | "seq2seq":
                both = np.concatenate([ids, ids[::-1]]).astype(np.int32)
                trained = np.arange(len(both)) >= len(ids)
                score = np.array([1.0]) if name == "embedding" else None
                weight = 1 if name == "embedding" else int(trained.sum())
                parts = (len(ids), len(ids))
                rows.append(Example(line, both, trained, weight, parts, score))
    return rows


def headed_trainer(
    directory: Path,
    name: str,
    *,
    precision: str = "fp32",
    peft: dict[str, Any] | None = None,
    rows: list[Example] | None = None,
    n_epochs: int = 10,
    **given: Any,
) -> Trainer:
    """A trainer of objective `name` on the base in a directory."""
    objective, params = objectives.resolve({"type": name, **OBJECTIVES[name], **given})
    spec = make_spec(
        objective=params.model_dump(),
        peft=methods.parse_params(peft or {"type": "lora", "r": 4, "dropout": 0.0}).model_dump(),
        precision={"type": precision},
        hyperparameters={"n_epochs": n_epochs, "batch_size": 4, "learning_rate_multiplier": 1.0},
    )
    head = Head(objective.head, objective.n_outputs(params), spec.seed)
    base = load_model(directory, precision=precision, head=head)
    method_params = methods.parse_params(spec.peft)
    method = methods.get_method(spec.peft["type"])
    model = adapt(base, method, method_params, spec.seed)
    seed_everything(spec.seed)  # as a job does: dropout draws from it
    return Trainer(
        Task(
            model=model,
            forward=method.wrap_forward(
                model, headed_forward(model, spec.precision, "cpu", 0), method_params
            ),
            method=method,
            method_params=method_params,
            objective=objective,
            objective_params=params,
            spec=spec,
            train=rows or rows_for(name),
            valid=[],
            device="cpu",
        )
    )
