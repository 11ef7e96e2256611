"""A worker without a job measures what somebody wants to know, in a real child process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from models.domain.estimates import Probe
from models.domain.status import JobStatus
from models.registry import base_models, jobs, probes
from models.tables import BaseProbe
from tests.worker.training.service import Service, chat_rows
from worker.measure import measure_next


@pytest.fixture
def service(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service.create(tmp_path, tiny_model)
    for name, value in {
        "DATABASE__URL": made.settings.database.url,
        "STORAGE__URL": made.settings.storage.url,
        "MODELS__CACHE_DIR": str(made.settings.models.cache_dir),
        "MODELS__CATALOG": f'{{"tiny": "path:{tiny_model}", "gone": "path:/nowhere"}}',
    }.items():
        monkeypatch.setenv(f"TUNERY_{name}", value)
    yield made
    made.database.close()


def wanted(service: Service, base_model: str) -> None:
    with service.database.write() as session:
        probes.want(session, base_model, "fp32")


def row(service: Service, base_model: str) -> BaseProbe:
    with service.database.read() as session:
        found = probes.get(session, base_model, "fp32")
        assert found is not None
        return found


def test_nothing_is_measured_that_nobody_wants(service: Service) -> None:
    assert not measure_next(service.database, lambda: False)


def test_a_base_model_is_measured_by_a_child(service: Service) -> None:
    wanted(service, "tiny")
    assert measure_next(service.database, lambda: False)
    assert Probe.model_validate(row(service, "tiny").values).n_adapter > 0
    assert not measure_next(service.database, lambda: False)


def test_a_base_model_that_cannot_be_loaded_is_recorded_as_such(service: Service) -> None:
    with service.database.write() as session:
        base_models.sync_catalog(
            session, {**service.settings.models.catalog, "gone": "path:/nowhere"}
        )
    wanted(service, "gone")
    assert measure_next(service.database, lambda: False)
    assert "exit status 1" in (row(service, "gone").failure or "")


def test_a_job_that_waits_goes_first(service: Service) -> None:
    service.upload("file-train", chat_rows(4))
    job = service.submit()
    with service.database.write() as session:
        jobs.move(session, job.id, JobStatus.QUEUED)
    wanted(service, "tiny")
    assert not measure_next(service.database, lambda: False)
    left = row(service, "tiny")
    assert (left.values, left.failure, left.claimed_until) == (None, None, None)
