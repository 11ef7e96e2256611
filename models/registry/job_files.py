"""Whether the files of a job can be trained on, as far as their lint reports say."""

from dataclasses import dataclass
from typing import Literal

from sqlalchemy.orm import Session

from models.domain.reports import DatasetReport
from models.domain.status import FileStatus
from models.domain.training import TrainingSpec
from models.tables import File

N_LABELS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class DataDemand:
    """What an objective asks of its files: forms of rows, and perhaps one closed set of labels."""

    forms: frozenset[str]
    closed_labels: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a job cannot run; `param` is the field of the request that names the file."""

    code: str
    message: str
    param: str


def judge(
    session: Session, spec: TrainingSpec, demand: DataDemand
) -> Literal[True] | Problem | None:
    """Return True if the files of a job can be trained on, None while one is not linted yet."""
    reports = [
        _judge_file(session, file_id, param, spec, demand)
        for param, file_id in (
            ("training_file", spec.training_file),
            ("validation_file", spec.validation_file),
        )
        if file_id is not None
    ]
    if None in reports:
        return None
    for report in reports:
        if isinstance(report, Problem):
            return report
    usable = [report for report in reports if isinstance(report, DatasetReport)]
    if demand.closed_labels and len(usable) == 2:
        return _compare_labels(*usable) or True
    return True


def _judge_file(
    session: Session, file_id: str, param: str, spec: TrainingSpec, demand: DataDemand
) -> DatasetReport | Problem | None:
    file = session.get(File, file_id)
    if file is None:
        return Problem("file_not_found", f"File {file_id} was deleted.", param)
    if file.status == FileStatus.UPLOADED:
        return None
    report = DatasetReport.model_validate(file.report)
    reason = file.status_details or "It has no usable row."
    if report.n_valid_rows and (file.status == FileStatus.PROCESSED or spec.on_error == "skip"):
        if report.form in demand.forms:
            return report
        reason = (
            f"Its rows are {report.form} rows ({report.shape}); objective "
            f"'{spec.objective['type']}' trains on {', '.join(sorted(demand.forms))} rows."
        )
    return _format_problem(param, reason)


def _compare_labels(train: DatasetReport, valid: DatasetReport) -> Problem | None:
    """Return a problem if validation rows have labels that no training row has.

    Beyond `MAX_LABELS` kinds a report counts only the most frequent ones, which proves nothing.
    """
    if train.labels_are_cut:
        return None
    unknown = [label for label in valid.labels if label not in train.labels]
    if not unknown:
        return None
    shown = ", ".join(
        f"'{label}' ({valid.labels[label]:,} rows)" for label in unknown[:N_LABELS_SHOWN]
    )
    more = f" and {len(unknown) - N_LABELS_SHOWN} more" if len(unknown) > N_LABELS_SHOWN else ""
    return _format_problem(
        "validation_file",
        f"Labels outside the training file's set: {shown}{more}. Correct them, or add training "
        "rows with these labels.",
    )


def _format_problem(param: str, reason: str) -> Problem:
    what = "training" if param == "training_file" else "validation"
    return Problem(
        "invalid_file_format",
        f"The job failed due to a file format error in the {what} file. {reason}",
        param,
    )
