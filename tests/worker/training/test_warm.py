"""The base model that a waiting trainer holds: given away once, to the job that it is for."""

import pytest
import torch

from models.domain.base import JsonObject
from models.domain.training import Precision, TrainingSpec
from tests.worker.training.service import Service
from worker.base_models import materialise
from worker.heads import Head
from worker.training import memory
from worker.training.warm import WarmBase

FP32 = Precision(type="fp32")


def loaded(service: Service, name: str = "tiny") -> WarmBase:
    warm = WarmBase()
    warm.load(service.settings, name, FP32)
    return warm


def test_a_job_takes_the_model_and_gives_what_it_gives_without(service: Service) -> None:
    job, twin = service.submit(), service.submit()
    assert service.run(twin) == 0
    warm = loaded(service)
    assert service.run(job, warm=warm) == 0
    _, base = materialise("tiny", service.settings.models)
    assert warm.take(base.fingerprint, FP32, Head()) is None  # the job had it
    one, other = service.adapters()
    assert one.digest == other.digest


def rehearsed(service: Service, peft: JsonObject) -> WarmBase:
    warm = WarmBase()
    warm.load(service.settings, "tiny", FP32, peft)
    return warm


def test_after_a_rehearsal_jobs_give_what_they_give_without(service: Service) -> None:
    first, same, other, together = (service.submit() for _ in range(4))
    assert service.run(first) == 0
    peft = TrainingSpec.model_validate(first.spec).peft
    warm = rehearsed(service, peft)
    assert service.run(same, warm=warm) == 0
    _, base = materialise("tiny", service.settings.models)
    assert warm.take(base.fingerprint, FP32, Head()) is None  # the job had it
    assert service.run(other, warm=rehearsed(service, {**peft, "r": 8})) == 0  # stripped again
    warm = rehearsed(service, {**peft, "use_dora": True})  # cannot be drawn again
    assert service.run(together, warm=warm) == 0
    assert len({adapter.digest for adapter in service.adapters()}) == 1


def test_a_waiting_job_ends_the_preparations(service: Service) -> None:
    job = service.submit()
    spec = TrainingSpec.model_validate(job.spec)
    warm = WarmBase()
    warm.load(service.settings, "tiny", FP32, spec.peft, lambda: True)
    _, base = materialise("tiny", service.settings.models)
    assert warm.take_rehearsed(base.fingerprint, spec) is None
    assert warm.take(base.fingerprint, FP32, Head()) is not None


@pytest.mark.parametrize("difference", ["model", "precision", "head"])
def test_a_model_that_is_not_meant_is_dropped(service: Service, difference: str) -> None:
    _, base = materialise("tiny", service.settings.models)
    fits = (base.fingerprint, FP32, Head("causal_lm", seed=3))
    changed = {
        "model": ("0" * 32, *fits[1:]),
        "precision": (fits[0], Precision(type="bf16"), fits[2]),
        "head": (*fits[:2], Head("sequence_classification", 2)),
    }[difference]
    warm = loaded(service)
    assert warm.take(*changed) is None
    assert warm.take(*fits) is None
    found = loaded(service).take(*fits)
    assert found is not None
    assert found.dtype == torch.float32


def test_little_memory_and_unknown_models_leave_it_empty(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base = materialise("tiny", service.settings.models)
    assert loaded(service, "gone").take(base.fingerprint, FP32, Head()) is None
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    assert loaded(service).take(base.fingerprint, FP32, Head()) is None
