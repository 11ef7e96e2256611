"""Every job keeps what it took, beside what had been reckoned."""

from models.domain.estimates import Estimate, Measured
from models.domain.training import Precision
from models.registry import job_runs, probes
from tests.worker.training.service import Service
from tests.worker.training.test_job import stop_after
from worker.training import exit_codes
from worker.training.loop import Trainer  # noqa: F401 (loads torch before the clock starts)
from worker.training.probe import measure
from worker.training.task import Stop


def probed(service: Service) -> None:
    measured = measure(service.settings, "tiny", Precision(type="fp32"))
    with service.database.write() as session:
        probes.want(session, "tiny", "fp32")
        row = probes.claim(session, 60)
        assert row is not None
        probes.record(session, row, measured)


def test_a_job_keeps_its_estimate_and_what_it_took(service: Service) -> None:
    probed(service)
    job = service.submit()
    assert service.run(job) == exit_codes.DONE
    done = service.job(job.id)
    expected = Estimate.model_validate(done.estimate)
    took = Measured.model_validate(done.measured)
    assert (expected.total_steps, expected.n_rows) == (done.total_steps, 12)
    assert expected.total_tokens == done.trained_tokens
    assert 0 < took.train_seconds < took.seconds
    assert (took.precision, took.device) == ("fp32", expected.device)
    assert took.reckoned_peak_bytes == expected.peak_bytes  # no job has corrected it yet
    second = service.submit()
    service.run(second)
    assert Estimate.model_validate(service.job(second.id).estimate).n_jobs_learned_from == 1


def test_a_job_on_a_base_that_nobody_measured_has_no_estimate(service: Service) -> None:
    job = service.submit()
    service.run(job)
    done = service.job(job.id)
    assert done.estimate is None
    assert Measured.model_validate(done.measured).reckoned_peak_bytes is None


def test_a_job_that_was_resumed_teaches_nothing(service: Service) -> None:
    job = service.submit()
    assert service.run(job, stop_after(2, Stop.DRAIN)) == exit_codes.DRAINED
    with service.database.write() as session:
        job_runs.release(session, job.id, job.attempt, "The worker shuts down.")
    assert service.run(service.claim()) == exit_codes.DONE
    assert service.job(job.id).measured is None
