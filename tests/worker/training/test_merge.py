"""A merged model is the base plus the adapter, in 16 bits, as a file that transformers loads."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.domain.adapter_files import WEIGHTS
from models.domain.limits import ProjectLimits
from models.domain.status import MergeStatus
from models.errors import UnprocessableError
from models.registry import merges, tenancy
from models.storage import adapter_prefix, fetch_file
from models.tables import Adapter, File, Merge
from tests.worker.training.service import PROJECT, Service
from worker.base_models import dequantise_, load_model
from worker.inference.own_model import with_adapter
from worker.training import exit_codes
from worker.training.merge import make, merge_weights

IDS = torch.tensor([[5, 81, 7, 300, 12]])


@pytest.fixture
def adapter(service: Service) -> Adapter:
    assert service.run(service.submit()) == exit_codes.DONE
    return service.adapters()[0]


def wanted(service: Service, model: str) -> str:
    with service.database.write() as session:
        return merges.want(session, PROJECT, model)[0].id


def made(service: Service, merge_id: str) -> Merge:
    make(service.settings, service.database, service.store, merge_id)
    with service.database.read() as session:
        return session.get_one(Merge, merge_id)


def files_of(service: Service, adapter: Adapter, target: Path) -> Path:
    target.mkdir()
    for file in adapter.manifest["files"]:
        key = f"{adapter_prefix(adapter.digest)}/{file['name']}"
        fetch_file(service.store, key, target / file["name"], sha256=file["sha256"])
    return target


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.float()(input_ids=IDS).logits
    return found


def test_a_merged_model_is_a_file_with_weights_configuration_and_tokenizer(
    service: Service, adapter: Adapter, tiny_base: Path, tmp_path: Path
) -> None:
    merge = made(service, wanted(service, adapter.name))
    assert (merge.status, merge.error) == (MergeStatus.SUCCEEDED, None)
    with service.database.read() as session:
        file = session.get_one(File, merge.file_id)
    assert file.filename.endswith("-merged.zip")
    archive, whole = tmp_path / "merged.zip", tmp_path / "whole"
    fetch_file(service.store, file.object_key, archive, sha256=file.sha256)
    assert archive.stat().st_size == file.bytes
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(whole)
    own = files_of(service, adapter, tmp_path / "adapter")
    expected = logits(with_adapter(load_model(tiny_base, precision="fp32"), own, "cpu").eval())
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert model.dtype == torch.bfloat16
    assert (logits(model) - expected).norm() / expected.norm() < 0.02
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (whole, tiny_base)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    with service.database.write() as session:
        assert merges.want(session, PROJECT, adapter.name)[0].id == merge.id


def test_the_adapter_is_added_to_the_dequantised_weights(
    service: Service, adapter: Adapter, tiny_base: Path, tmp_path: Path
) -> None:
    own = files_of(service, adapter, tmp_path / "adapter")
    errors = merge_weights(tiny_base, own, tmp_path / "merged", {"type": "nf4"})
    assert errors.merged < 1e-5
    assert errors.rounded < 0.02
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(model.config, "quantization_config")
    base = load_model(tiny_base, precision="nf4")
    dequantise_(base)
    expected = logits(with_adapter(base, own, "cpu").eval())
    assert (logits(model) - expected).norm() / expected.norm() < 0.02


def test_what_does_not_fit_fails_with_the_reason_and_leaves_no_file(
    service: Service, adapter: Adapter, tiny_base: Path, tmp_path: Path
) -> None:
    with service.database.write() as session:
        limits = ProjectLimits(max_bytes=1000)
        tenancy.set_limits(session, tenancy.get_project(session, PROJECT), limits)
    keys = service.keys("files")
    merge = made(service, wanted(service, adapter.name))
    assert merge.status == MergeStatus.FAILED
    assert "may store" in (merge.error or "")
    assert service.keys("files") == keys
    assert wanted(service, adapter.name) != merge.id
    own = files_of(service, adapter, tmp_path / "adapter")
    tensors = load_file(own / WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), own / WEIGHTS)
    with pytest.raises(UnprocessableError, match="cannot be merged: tensors are missing"):
        merge_weights(tiny_base, own, tmp_path / "merged", {"type": "fp32"})
