"""Jobs of a service that share one process: each ends as it would have ended alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from models.storage import adapter_prefix, fetch_file
from models.tables import File, Job
from tests.worker.training.service import Service, chat_rows
from worker.training import exit_codes, together
from worker.training.checkpoint import ADAPTER_TENSORS
from worker.training.task import Stop
from worker.training.together import JobsTogether

Asked = Callable[[str], Stop | None]


def never(_: str) -> Stop | None:
    return None


def run(service: Service, jobs: list[Job], asked: Asked = never) -> dict[str, int]:
    """Train jobs together; return the exit code of each."""
    ends: dict[str, int] = {}
    orders = [(job.id, job.attempt) for job in jobs]

    def tell(job_id: str, exit_code: int) -> None:
        assert job_id not in ends
        ends[job_id] = exit_code

    JobsTogether(service.settings, service.database, orders, asked, tell).run()
    return ends


def two_jobs(service: Service, **changes: Any) -> list[Job]:
    """One job of 6 steps, one of 12 with another adapter and other data, the tests' tiny ones."""
    with service.database.read() as session:
        is_new = session.get(File, "file-more") is None
    if is_new:
        service.upload("file-more", chat_rows(9)[3:])
    lora = {"type": "lora", "r": 2, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
    return [
        service.submit(**changes),
        service.submit(
            training_file="file-more",
            seed=3,
            peft=lora,
            hyperparameters={"n_epochs": 2, "batch_size": 1},
            **changes,
        ),
    ]


def require_equal(service: Service, job: Job, twin: Job) -> None:
    """The adapters of two jobs are equal within what rounding and Adam make of it in 12 steps.

    Products of other shapes round otherwise on some processors, and Adam makes whole steps of small
    differences: close at first, near to the end.
    """
    found = []
    digests = {row.job_id: row.digest for row in service.adapters()}
    for each in (job, twin):
        path = service.settings.worker.scratch_dir / f"{each.id}.safetensors"
        key = f"{adapter_prefix(digests[each.id])}/{ADAPTER_TENSORS}"
        fetch_file(service.store, key, path)
        found.append(load_file(path))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert (tensor - found[1][name]).norm() <= 1e-3 * tensor.norm() + 1e-6, name
    losses = [[point.train_loss for point in service.trace(each.id)] for each in (job, twin)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.fixture(scope="module")
def shared(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for all tests that compare with jobs which ran alone."""
    made = Service.create(tmp_path_factory.mktemp("together"), tiny_base)
    made.upload("file-train", chat_rows(12))
    yield made
    made.database.close()


@pytest.fixture(scope="module")
def alone(shared: Service) -> list[Job]:
    """The two jobs, each trained in a run of its own."""
    jobs = two_jobs(shared)
    for job in jobs:
        assert shared.run(job) == exit_codes.DONE
    return jobs


def test_two_jobs_give_the_adapters_that_each_gives_alone(
    shared: Service, alone: list[Job]
) -> None:
    jobs = two_jobs(shared)
    assert run(shared, jobs) == {job.id: exit_codes.DONE for job in jobs}
    for job, twin in zip(jobs, alone, strict=True):
        assert shared.job(job.id).status == "succeeded"
        assert shared.job(job.id).measured is None  # its memory is not its own
        require_equal(shared, job, twin)
    assert not [path for path in shared.settings.worker.scratch_dir.iterdir() if path.is_dir()]


def test_a_cancelled_job_and_a_faulty_one_leave_the_other_as_it_is(
    shared: Service, alone: list[Job]
) -> None:
    jobs = two_jobs(shared)
    shared.upload("file-long", [{**chat_rows(1)[0]}, *chat_rows(3)])
    faulty = shared.submit(training_file="file-long", max_seq_length=16)

    def cancel(job_id: str) -> Stop | None:
        row = shared.job(job_id)
        return Stop.CANCEL if job_id == jobs[0].id and row.step >= 1 else None

    ends = run(shared, [faulty, *jobs], cancel)
    assert ends == {
        faulty.id: exit_codes.FAILED,
        jobs[0].id: exit_codes.CANCELLED,
        jobs[1].id: exit_codes.DONE,
    }
    assert shared.job(faulty.id).status == "failed"
    require_equal(shared, jobs[1], alone[1])


def test_drained_jobs_go_on_together_or_alone(shared: Service, alone: list[Job]) -> None:
    jobs = two_jobs(shared)

    def drain(job_id: str) -> Stop | None:
        return Stop.DRAIN if shared.job(jobs[0].id).step >= 1 else None

    assert set(run(shared, jobs, drain).values()) == {exit_codes.DRAINED}
    assert all(shared.checkpoints(job.id) for job in jobs)
    jobs = [shared.requeue(job) for job in jobs]
    assert [job.attempt for job in jobs] == [2, 2]
    assert run(shared, jobs[:1]) == {jobs[0].id: exit_codes.DONE}
    assert shared.run(jobs[1]) == exit_codes.DONE
    for job, twin in zip(jobs, alone, strict=True):
        require_equal(shared, job, twin)


def test_lack_of_memory_gives_the_jobs_back_for_runs_of_their_own(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(together, "base_of", too_large)
    jobs = two_jobs(service)
    assert set(run(service, jobs).values()) == {1}
    assert {service.job(job.id).status for job in jobs} == {"running"}


def test_a_base_that_cannot_be_packed_trains_one_and_gives_the_other_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "choose_forward", lambda *_, **__: (object(), "refused"))
    jobs = two_jobs(service)
    ends = run(service, jobs)
    assert ends == {jobs[0].id: exit_codes.DONE, jobs[1].id: exit_codes.DRAINED}
    assert service.job(jobs[0].id).status == "succeeded"
