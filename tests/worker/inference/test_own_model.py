"""A base and an adapter as one model: what it computes is what PEFT computes with both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from tests.worker.inference.tiny import collect, submit, tiny_llama
from worker import base_models
from worker.base_models import dequantise_, load_model
from worker.inference import own_model
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.half_linear import HalfLinear
from worker.inference.engine.params import Sampling
from worker.inference.own_model import load_own_model
from worker.training import methods
from worker.training.model import trainable_parameters
from worker.training.tuners.attach import without_known_warnings

IDS = torch.arange(3, 15)[None]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # So PEFT's own pass calls the cache of a prefix.
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(directory)
    return directory


def write_adapter(directory: Path, peft: dict[str, Any], seed: int = 0, model: Any = None) -> Path:
    """The files of an adapter of any method with random weights, on a model or `tiny_llama`."""
    method, params = methods.get_method(peft["type"]), methods.parse_params(peft)
    model = method.attach(model or tiny_llama(), params, 7)
    generator = torch.Generator().manual_seed(seed)
    trained = {
        name: each.detach() + 0.3 * torch.randn(each.shape, generator=generator)
        for name, each in trainable_parameters(model).items()
    }
    directory.mkdir(parents=True)
    config = method.adapter_config(model, params, "tiny")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(method.published(trained, params), directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    "peft",
    [
        {"type": "full"},
        {"type": "houlsby", "r": 4},
        {"type": "ia3"},
        {"type": "meft", "r": 4, "lambda_bits": 3},
        {"type": "vera", "r": 8},
        {"type": "randlora", "r": 8},
        {"type": "oft", "block_size": 8},
        {"type": "loha", "r": 4},
        {"type": "lokr", "r": 4},
        {"type": "miss", "r": 8},
        {"type": "adalora", "r": 2, "initial_r": 4},
        {"type": "prompt", "n_tokens": 5},
        {"type": "prefix", "n_tokens": 5},
    ],
    ids=lambda peft: str(peft["type"]),
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_computes_what_peft_computes_with_the_two(
    peft: dict[str, Any], precision: str, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", peft)
    served = "merged" if peft["type"] in ("full", "ia3") else "own"
    own = load_own_model(base_directory, adapter, served, precision=precision, device="cpu")
    model: Any = own.model
    assert (own.drift is not None) == (served == "merged")
    assert own.n_bytes >= sum(each.nbytes for each in model.parameters())
    base: Any = load_model(base_directory, precision=precision).float()
    with torch.no_grad():
        plain = base(IDS).logits
        with without_known_warnings():
            both: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
        # PEFT's own pass gives logits for virtual tokens too, which come first.
        found, expected = model(IDS).logits.float(), both(IDS).logits[:, -IDS.shape[1] :]
    # What is merged is held in float32; beside its modules the base stays in bfloat16.
    # Where a processor computes in it, the rounding alone is 1.4e-2 of the base's own logits.
    tolerance = 1e-5 if precision == "fp32" or served == "merged" else 6e-2
    assert float((found - expected).norm() / expected.norm()) <= tolerance
    assert float((found - plain).norm() / plain.norm()) > 0.05


def test_merged_into_a_base_in_nf4_it_computes_what_peft_computes_with_the_dequantised_weights(
    base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"type": "miss", "r": 8})
    own = load_own_model(base_directory, adapter, "merged", precision="nf4", device="cpu")
    model: Any = own.model
    base: Any = load_model(base_directory, precision="nf4")
    dequantise_(base)
    both: Any = PeftModel.from_pretrained(base.float(), str(adapter)).eval()
    with torch.no_grad():
        found, expected = model(IDS).logits, both(IDS).logits
    assert model.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_to_be_as_fast_as_the_base_it_is_held_as_the_base_and_the_rounding_is_drift(
    precision: str, base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that has products in bfloat16."""
    monkeypatch.setattr(base_models, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(own_model, "compute_dtype", lambda device: torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", {"type": "lora", "r": 4})
    exact, rounded = (
        load_own_model(base_directory, adapter, served, precision=precision, device="cpu")
        for served in ("merged", "rounded")
    )
    unmerged = own_model.with_adapter(load_model(base_directory, precision="bf16"), adapter, "cpu")
    with torch.no_grad():
        in_16_bits, in_32_bits = unmerged(IDS).logits.float(), unmerged.float()(IDS).logits
    in_the_batch = float((in_16_bits - in_32_bits).norm() / in_32_bits.norm())
    assert (exact.model.dtype, rounded.model.dtype) == (torch.float32, torch.bfloat16)
    assert rounded.n_bytes < 0.51 * exact.n_bytes
    assert exact.drift is not None
    assert rounded.drift is not None
    assert exact.drift <= own_model.MERGE_TOLERANCE < 1e-3 < rounded.drift < in_the_batch
    buffers = dict(exact.model.named_buffers())
    assert all(torch.equal(each, buffers[name]) for name, each in rounded.model.named_buffers())


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_where_the_base_is_held_in_float16_so_is_what_is_as_fast_as_it(
    precision: str, base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU without products in bfloat16."""
    monkeypatch.setattr(base_models, "compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(own_model, "compute_dtype", lambda device: torch.float32)
    adapter = write_adapter(tmp_path / "adapter", {"type": "lora", "r": 4})
    own = load_own_model(base_directory, adapter, "rounded", precision=precision, device="cpu")
    layers = [each for each in own.model.modules() if isinstance(each, torch.nn.Linear)]
    assert {type(each) for each in layers} == {HalfLinear}
    weights = sum(each.in_features * each.out_features for each in layers)
    assert 2 * weights < own.n_bytes < 4 * weights
    assert own.drift is not None
    assert own_model.MERGE_TOLERANCE < own.drift < 3e-2


def test_merged_it_is_refused_if_its_logits_are_others(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_model, "MERGE_TOLERANCE", 1e-12)
    adapter = write_adapter(tmp_path / "adapter", {"type": "lora", "r": 4})
    with pytest.raises(ValueError, match="its logits are off by"):
        load_own_model(base_directory, adapter, "merged", precision="fp32", device="cpu")


def test_an_adapter_with_a_tensor_missing_is_refused(base_directory: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"type": "ia3"})
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        load_own_model(base_directory, adapter, "merged", precision="fp32", device="cpu")


def greedy(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """Six tokens, each from all that stands before it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_engine_answers_after_virtual_tokens_as_peft_generates(
    kind: str, base_directory: Path, tmp_path: Path
) -> None:
    """Two prompts in one batch, one of them fed in pieces; no stored prefix shifts the second."""
    adapter = write_adapter(tmp_path / "adapter", {"type": kind, "n_tokens": 5})
    prompts = [tuple(range(40, 110)), (7,), tuple(range(40, 111))]
    peft: Any = PeftModel.from_pretrained(tiny_llama(), str(adapter)).eval()
    expected, plain = (
        [greedy(model, prompt) for prompt in prompts] for model in (peft, tiny_llama())
    )
    assert expected != plain
    own = load_own_model(base_directory, adapter, "own", precision="fp32", device="cpu")
    model: Any = own.model
    engine = BatchingEngine(model, lambda ids: "".join(chr(256 + i) for i in ids), [])
    streams = [submit(engine, Request(prompt, Sampling(6, temperature=0))) for prompt in prompts]
    answers = [[ord(each) - 256 for each in collect(stream)[0]] for stream in streams]
    engine.close()
    assert answers == expected
