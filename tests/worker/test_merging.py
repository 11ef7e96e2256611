"""A worker without a job makes merged models, each in a child, and says how that ended."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from models.domain.status import MergeStatus
from models.registry import merges
from models.tables import Adapter, Merge
from tests.worker.training.service import PROJECT, Service
from worker.merging import merge_next

NAME = "ft:tiny:local::gone"


@pytest.fixture
def service(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service.create(tmp_path, tiny_model)
    for name, value in {
        "DATABASE__URL": made.settings.database.url,
        "STORAGE__URL": made.settings.storage.url,
        "MODELS__CACHE_DIR": str(made.settings.models.cache_dir),
        "MODELS__CATALOG": f'{{"tiny": "path:{tiny_model}"}}',
        "WORKER__SCRATCH_DIR": str(made.settings.worker.scratch_dir),
    }.items():
        monkeypatch.setenv(f"TUNERY_{name}", value)
    with made.database.write() as session:
        adapter = Adapter(
            name=NAME,
            project_id=PROJECT,
            base_model="tiny",
            digest="d" * 40,
            bytes=1,
            manifest={"base_fingerprint": "another", "precision": {}},
        )
        session.add(adapter)
    yield made
    made.database.close()


def wanted(service: Service) -> str:
    with service.database.write() as session:
        return merges.want(session, PROJECT, NAME)[0].id


def row(service: Service, merge_id: str) -> Merge:
    with service.database.read() as session:
        return session.get_one(Merge, merge_id)


def test_a_child_says_why_it_could_not_merge(service: Service) -> None:
    assert not merge_next(service.database, lambda: False)
    merge_id = wanted(service)
    assert merge_next(service.database, lambda: False)
    ended = row(service, merge_id)
    assert ended.status == MergeStatus.FAILED
    assert "the base model has changed" in (ended.error or "")
    assert not merge_next(service.database, lambda: False)


def test_a_worker_that_stops_leaves_a_merge_to_another(service: Service) -> None:
    merge_id = wanted(service)
    assert not merge_next(service.database, lambda: True)
    assert row(service, merge_id).status == MergeStatus.QUEUED


def test_a_child_that_dies_fails_the_merge(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNERY_DATABASE__URL", "sqlite:////nowhere/at/all.db")
    merge_id = wanted(service)
    assert merge_next(service.database, lambda: False)
    assert "exit status 1" in (row(service, merge_id).error or "")
