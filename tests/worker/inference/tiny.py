"""Tiny random models and adapters: real architectures and real files, in milliseconds."""

import json
import queue
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from models.domain.generation import AdapterRef
from models.domain.reports import AdapterManifest
from models.storage import ObjectStore
from worker.adapter_format import digest_of, put_adapter
from worker.base_models import BaseModelInfo
from worker.inference.engine.engine import BatchingEngine, Engine, Request
from worker.inference.engine.errors import EngineError
from worker.inference.engine.params import ModuleShape, TokenEvent

ADAPTER_BYTES = 7168
"""What the adapter of `Files` takes in memory on `tiny_llama`, in float32."""

END = 0
"""The end token of byte-sized models."""


def tiny_llama(vocab_size: int = 256, **changes: Any) -> LlamaForCausalLM:
    """A random two-layer Llama in float32; the same weights on every call."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "initializer_range": 0.2,
        "eos_token_id": END,
        "bos_token_id": None,
    }
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    torch.random.set_rng_state(generator)
    return model


def decode_bytes(ids: Sequence[int]) -> str:
    """A vocabulary in which every token is one byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def byte_engine(model: LlamaForCausalLM | None = None, **options: Any) -> BatchingEngine:
    return BatchingEngine(model or tiny_llama(), decode_bytes, [END], **options)


def shapes_of(model: torch.nn.Module) -> dict[str, ModuleShape]:
    """The linear layers of an unwrapped model, as the engine would see them."""
    return {
        path: ModuleShape(module.in_features, module.out_features, is_output=path == "lm_head")
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


class Files:
    """The two files of an adapter before they are written, for a test to spoil."""

    def __init__(
        self, shapes: Mapping[str, ModuleShape], *, seed: int = 0, r: int = 4, size: float = 0.1
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": 2 * r,
            "target_modules": ["q_proj", "v_proj"],
        }
        self.tensors: dict[str, torch.Tensor] = {}
        for path, shape in shapes.items():
            if path.endswith(("q_proj", "v_proj")):
                key = f"base_model.model.{path}"
                a = torch.randn(r, shape.in_features, generator=generator)
                b = torch.randn(shape.out_features, r, generator=generator)
                self.tensors[f"{key}.lora_A.weight"] = a * size
                self.tensors[f"{key}.lora_B.weight"] = b * size

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, directory / "adapter_model.safetensors")
        return directory


def publish(
    store: ObjectStore,
    directory: Path,
    base: BaseModelInfo,
    *,
    template_sha256: str = "",
    **changes: Any,
) -> AdapterRef:
    """Store the adapter in `directory` as a trainer would, and return the reference to it."""
    digest, files = digest_of(directory)
    fields: dict[str, Any] = {
        "digest": digest,
        "files": files,
        "base_model": base.name,
        "base_fingerprint": base.fingerprint,
        "vocab_size": base.vocab_size,
        "template_sha256": template_sha256,
        "method": "lora",
        "objective": "sft",
        "precision": {"type": "nf4"},
        "step": 1,
        "spec_sha256": "0" * 64,
        "data_sha256": "0" * 64,
        "versions": {},
    }
    manifest = AdapterManifest(**{**fields, **changes})
    put_adapter(store, directory, manifest)
    return AdapterRef(
        name=f"ft:{base.name}:{digest[:6]}",
        digest=digest,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
    )


Events = queue.SimpleQueue[tuple[int, TokenEvent | EngineError]]


def submit(engine: Engine, request: Request) -> Events:
    events: Events = queue.SimpleQueue()
    engine.submit(request, lambda index, event: events.put((index, event)))
    return events


def collect(events: Events) -> tuple[str, TokenEvent]:
    """The text of a single choice and its last event; an error is raised."""
    text = ""
    while True:
        _, event = events.get(timeout=60)
        if isinstance(event, EngineError):
            raise event
        text += event.text
        if event.finish_reason is not None:
            return text, event


def generate(engine: Engine, request: Request) -> tuple[str, TokenEvent]:
    return collect(submit(engine, request))
