"""A base and an adapter as one model: what it computes is what PEFT computes with both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from tests.worker.inference.tiny import tiny_llama
from worker.base_models import load_model
from worker.inference.own_model import load_own_model
from worker.training import methods
from worker.training.model import trainable_parameters

IDS = torch.arange(3, 15)[None]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


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
    ],
    ids=lambda peft: str(peft["type"]),
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_computes_what_peft_computes_with_the_two(
    peft: dict[str, Any], precision: str, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", peft)
    served = "merged" if peft["type"] in ("full", "ia3") else "own"
    model: Any = load_own_model(base_directory, adapter, served, precision=precision, device="cpu")
    base: Any = load_model(base_directory, precision=precision).float()
    with torch.no_grad():
        plain = base(IDS).logits
        both: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
        found, expected = model(IDS).logits.float(), both(IDS).logits
    # What is merged is held in float32; beside its modules the base stays in bfloat16.
    tolerance = 1e-5 if precision == "fp32" or served == "merged" else 3e-2
    assert float((found - expected).norm() / expected.norm()) <= tolerance
    assert float((found - plain).norm() / plain.norm()) > 0.05


def test_an_adapter_with_a_tensor_missing_is_refused(base_directory: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"type": "ia3"})
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        load_own_model(base_directory, adapter, "merged", precision="fp32", device="cpu")
