"""Which queued jobs are trained together: small steps of the same base in the same precision.

A step shares its products with frozen weights with those of other jobs. That pays while the steps
are small; large ones fill a device alone, so such jobs get no company. Lengths are not known before
the rows are tokens: they are reckoned from the size of the file.
"""

from collections.abc import Callable

from sqlalchemy.orm import Session

from models.domain.reports import DatasetReport
from models.domain.training import TrainingSpec
from models.registry import job_runs
from models.settings import WorkerSettings
from models.tables import File, Job
from worker.training import methods, objectives
from worker.training.task import SHARED_STEP_TOKENS

BYTES_PER_TOKEN = 4.0
"""About so many of a data set's bytes, the signs of its format included, make a token."""


def claim(session: Session, first: Job, settings: WorkerSettings, device: str) -> list[Job]:
    """Take what is queued and can be trained beside `first`, up to ``joint_jobs`` with it.

    Args:
        session: The caller's.
        first: As `job_runs.claim` returned it.
        settings: Of this worker.
        device: ``cpu`` or ``cuda``.
    """
    limit = SHARED_STEP_TOKENS[device]
    if settings.joint_jobs == 1 or not may_share(session, first, limit):
        return []
    return job_runs.claim_companions(
        session, first, settings.lease_seconds, settings.joint_jobs - 1, _beside(first, limit)
    )


def _beside(first: Job, limit: int) -> Callable[[Session, Job], bool]:
    wanted = TrainingSpec.model_validate(first.spec)

    def suits(session: Session, job: Job) -> bool:
        spec = TrainingSpec.model_validate(job.spec)
        return spec.precision == wanted.precision and may_share(session, job, limit)

    return suits


def may_share(session: Session, job: Job, limit: int) -> bool:
    """Tell whether a job's steps gain by passes that are shared with other jobs'.

    Args:
        session: The caller's.
        job: Its files are linted.
        limit: Most tokens of such a step.
    """
    spec = TrainingSpec.model_validate(job.spec)
    objective, objective_params = objectives.resolve(spec.objective)
    method = methods.get_method(spec.peft["type"])
    if spec.num_devices > 1 or not spec.packing or not objective.mixes(objective_params):
        return False
    if not method.mixes(methods.parse_params(spec.peft)):
        return False
    file = session.get(File, job.training_file)
    if file is None or file.report is None:
        return False
    return _step_tokens(spec, file) <= limit


def _step_tokens(spec: TrainingSpec, file: File) -> float:
    """Return about how many tokens a step of a job has."""
    n_rows = max(1, DatasetReport.model_validate(file.report).n_valid_rows)
    n_trained = max(1, round(n_rows * (1 - (spec.validation_split or 0.0))))
    batch_size = spec.resolved(n_trained, n_parameters=1).hyperparameters.batch_size
    assert isinstance(batch_size, int)
    row_tokens = min(file.bytes / n_rows / BYTES_PER_TOKEN, spec.max_seq_length)
    return batch_size * row_tokens
