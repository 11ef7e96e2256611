"""What is checked before an adapter gets its name, and the results file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.domain.reports import StepMetrics
from models.errors import TrainingFailedError
from models.storage import adapter_prefix
from tests.worker.training.service import PROJECT, Service
from tests.worker.training.test_report import point
from tests.worker.training.tiny import make_trainer
from worker.base_models import BaseModelInfo
from worker.training import checkpoint
from worker.training.loop import Trainer
from worker.training.publish import Publisher, RunIdentity, results_csv

BASE = BaseModelInfo(
    name="tiny",
    source="path:tiny",
    fingerprint="0123456789abcdef0123456789abcdef",
    config_sha256="c" * 64,
    weights_sha256="d" * 64,
    vocab_size=97,
    n_parameters=1,
    max_length=512,
)


@pytest.fixture
def trainer() -> Trainer:
    trainer = make_trainer()
    trainer.step()
    return trainer


@pytest.fixture
def publisher(service: Service, trainer: Trainer) -> Publisher:
    job = service.submit()
    run = RunIdentity(
        job_id=job.id,
        attempt=job.attempt,
        project_id=PROJECT,
        organization="local",
        spec=trainer.task.spec,
        data_sha256="a" * 64,
        base=BASE,
        template_sha256="b" * 64,
        chat_template="{{ messages }}",
        tokenizer_sha256="c" * 64,
    )
    return Publisher(service.database, service.store, run)


def test_weights_that_changed_after_the_save_are_not_published(
    service: Service, trainer: Trainer, publisher: Publisher, tmp_path: Path
) -> None:
    checkpoint.save(trainer, tmp_path / "state", "tiny")
    with torch.no_grad():
        next(iter(trainer.parameters.values())).add_(1e-6)
    with pytest.raises(TrainingFailedError, match="is not what was trained") as caught:
        publisher.adapter(trainer, tmp_path / "state", tmp_path / "verify", trainer.progress)
    assert caught.value.code == "adapter_not_servable"
    assert service.adapters() == []


def test_a_configuration_that_changes_the_answers_is_not_published(
    service: Service, trainer: Trainer, publisher: Publisher, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.copy_(torch.randn_like(parameter))
    checkpoint.save(trainer, tmp_path / "state", "tiny")
    path = tmp_path / "state" / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    with pytest.raises(TrainingFailedError, match="does not give the logits"):
        publisher.adapter(trainer, tmp_path / "state", tmp_path / "verify", trainer.progress)
    assert service.adapters() == []


def test_bytes_that_the_store_spoils_are_not_published(
    service: Service,
    trainer: Trainer,
    publisher: Publisher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint.save(trainer, tmp_path / "state", "tiny")
    put = type(service.store).put

    def spoil(self: Any, key: str, data: Any, **options: Any) -> None:
        put(self, key, b"spoilt" if key.endswith(".safetensors") else data, **options)

    monkeypatch.setattr(type(service.store), "put", spoil)
    with pytest.raises(TrainingFailedError, match="has sha256"):
        publisher.adapter(trainer, tmp_path / "state", tmp_path / "verify", trainer.progress)
    assert service.adapters() == []


def test_a_published_adapter_ends_the_job_in_the_same_transaction(
    service: Service, trainer: Trainer, publisher: Publisher, tmp_path: Path
) -> None:
    checkpoint.save(trainer, tmp_path / "state", "tiny")
    name = publisher.adapter(trainer, tmp_path / "state", tmp_path / "verify", trainer.progress)
    (adapter,) = service.adapters()
    assert adapter.job_id is not None
    job = service.job(adapter.job_id)
    assert (adapter.name, job.fine_tuned_model, job.status) == (name, name, "succeeded")
    listed = sum(info.size for info in service.store.list(adapter_prefix(adapter.digest)))
    assert 0 < adapter.bytes < listed


def test_results_leave_a_cell_empty_where_nothing_was_measured() -> None:
    measured = point(2).model_copy(update={"valid_loss": 1.5, "full_valid_loss": 1.25})
    lines = results_csv([point(1), measured]).decode().splitlines()
    header, first, second = (line.split(",") for line in lines)
    assert header[:5] == [
        "step",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
    ]
    assert set(header[5:]) | {"train_mean_token_accuracy", *header[:5]} == {
        *StepMetrics.model_fields,
        "train_accuracy",
    }
    assert first[:5] == ["1", "2.0", "0.5", "", ""]
    assert second[3] == "1.5"
    assert second[header.index("full_valid_loss")] == "1.25"
