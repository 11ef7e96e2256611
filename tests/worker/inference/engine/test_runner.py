"""Mixed batches answer, token for token, what PEFT's own ``generate`` answers with one adapter.

Every family is served all kinds of adapters at once, in one batch with base requests.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.worker.inference.tiny import collect, submit, tiny_llama
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.params import Sampling
from worker.inference.engine.pool import AdapterLease

# peft 0.21.2 reads an attribute that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

N_TOKENS = 8
PROMPTS = [tuple(range(40, 60)), (7,)]
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


def qwen2() -> PreTrainedModel:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for module in model.modules():  # its q, k and v have biases, which start at zero
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    return model


def gpt2() -> PreTrainedModel:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    sizes |= {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(**sizes, **UNTIED)
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


LLAMA_LIKE = {
    "attention": ["q_proj", "v_proj"],
    "values": ["k_proj", "v_proj"],
    "down": ["down_proj"],
    "first": "layers.0.self_attn.q_proj",
}
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": (lambda: tiny_llama(hidden_size=32, intermediate_size=48), LLAMA_LIKE),
    "qwen2": (qwen2, LLAMA_LIKE),
    "gemma": (lambda: GemmaForCausalLM(GemmaConfig(**SIZES)), LLAMA_LIKE),
    # Sliding windows in every other layer: its sequences decode in turn.
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=8, **UNTIED)),
        LLAMA_LIKE,
    ),
    "gpt2": (
        gpt2,
        {
            "attention": ["c_attn"],
            "values": ["c_attn"],
            "down": ["mlp.c_proj"],
            "first": "h.0.attn.c_attn",
            "fan_in_fan_out": True,
        },
    ),
}


def configurations(names: dict[str, Any]) -> dict[str, Any]:
    """One adapter of every kind, ranks 4 to 64."""
    layout = {"fan_in_fan_out": names.get("fan_in_fan_out", False)}
    ranks = {
        f"rank {r}": LoraConfig(**layout, r=r, target_modules="all-linear") for r in (4, 16, 64)
    }
    attention, both = names["attention"], [*names["attention"], *names["down"]]
    first = names["first"]
    return {
        **ranks,
        "rslora": LoraConfig(
            **layout, r=16, lora_alpha=8, use_rslora=True, target_modules=attention
        ),
        "patterns": LoraConfig(
            **layout, r=4, rank_pattern={first: 32}, alpha_pattern={first: 3}, target_modules=both
        ),
        "dora": LoraConfig(
            **layout, r=8, lora_alpha=12, use_dora=True, target_modules="all-linear"
        ),
        "ia3": IA3Config(
            **layout,
            target_modules=[*names["values"], *names["down"]],
            feedforward_modules=names["down"],
        ),
    }


def random_adapter(model: PreTrainedModel, config: Any, directory: Path, seed: int) -> None:
    """Write an adapter of random weights that changes what the model says."""
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_A" in name or "lora_B" in name:
            parameter.data = 0.3 * noise
        elif "magnitude" in name or "ia3" in name:
            parameter.data *= 1 + 0.4 * noise
    peft_model.save_pretrained(str(directory), save_embedding_layers=False)


def greedy(model: Any, prompt: tuple[int, ...]) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=N_TOKENS, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_gives_the_tokens_that_peft_gives_for_each_adapter_alone(
    family: str, tmp_path: Path
) -> None:
    build, names = FAMILIES[family]
    torch.manual_seed(1)
    model = build().eval()

    def fresh() -> PreTrainedModel:
        return copy.deepcopy(model)

    expected = {("base", prompt): greedy(fresh(), prompt) for prompt in PROMPTS}
    for seed, (name, config) in enumerate(configurations(names).items()):
        random_adapter(fresh(), config, tmp_path / name, seed)
        alone = PeftModel.from_pretrained(fresh(), str(tmp_path / name)).eval()
        expected |= {(name, prompt): greedy(alone, prompt) for prompt in PROMPTS}
        assert any(expected[name, p] != expected["base", p] for p in PROMPTS), f"{name} is idle"

    def spell(ids: Any) -> str:
        return "".join(chr(256 + i) for i in ids)

    engine = BatchingEngine(fresh(), spell, [])
    leases: dict[str, AdapterLease | None] = {"base": None}
    for name in configurations(names):
        leases[name] = engine.load(name, tmp_path / name)
    sampling = Sampling(N_TOKENS, temperature=0)
    streams = {
        (name, prompt): submit(engine, Request(prompt, sampling, lease=leases[name]))
        for name, prompt in expected
    }
    answers = {key: [ord(c) - 256 for c in collect(stream)[0]] for key, stream in streams.items()}
    engine.close()
    assert answers == expected
