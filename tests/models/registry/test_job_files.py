"""What the lint reports of a job's files allow: forms of rows, and one closed set of labels."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from api.cli.migrate import upgrade
from models.db import Database
from models.domain.reports import DatasetReport
from models.domain.status import FileStatus
from models.domain.training import TrainingSpec
from models.registry import tenancy
from models.registry.job_files import DataDemand, Problem, judge
from models.settings import DatabaseSettings
from models.tables import File

CLASSES = DataDemand(frozenset({"labelled"}), closed_labels=True)
NUMBERS = DataDemand(frozenset({"labelled"}))
SPEC = TrainingSpec.model_validate(
    {
        "model": "base",
        "training_file": "file-t",
        "validation_file": "file-v",
        "seed": 1,
        "objective": {"type": "sft"},
        "peft": {"type": "lora"},
    }
)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    url = f"sqlite:///{tmp_path / 'tunery.db'}"
    upgrade(url)
    database = Database(DatabaseSettings(url=url))
    with database.write() as opened:
        yield opened
    database.close()


def add(session: Session, file_id: str, labels: dict[str, int], *, cut: bool = False) -> None:
    report = DatasetReport(
        n_rows=9, n_valid_rows=9, form="labelled", labels=labels, labels_are_cut=cut
    )
    session.add(
        File(
            id=file_id,
            project_id=tenancy.default_project(session).id,
            purpose="fine-tune",
            filename="x",
            bytes=1,
            sha256="",
            object_key=f"files/{file_id}",
            status=FileStatus.PROCESSED,
            report=report.model_dump(mode="json"),
        )
    )
    session.flush()


def test_a_label_that_no_training_row_has_is_named(session: Session) -> None:
    add(session, "file-t", {"sport": 5, "tech": 4})
    add(session, "file-v", {"sport": 2, "tehc": 3, "Sport": 1})
    problem = judge(session, SPEC, CLASSES)
    assert isinstance(problem, Problem)
    assert (problem.code, problem.param) == ("invalid_file_format", "validation_file")
    assert "'tehc' (3 rows), 'Sport' (1 rows)" in problem.message


def test_labels_of_the_training_file_alone_are_all_right(session: Session) -> None:
    add(session, "file-t", {"sport": 5, "tech": 4})
    add(session, "file-v", {"sport": 2})
    assert judge(session, SPEC, CLASSES) is True


def test_numbers_to_predict_are_no_set(session: Session) -> None:
    add(session, "file-t", {"0.5": 5})
    add(session, "file-v", {"0.7": 2})
    assert judge(session, SPEC, NUMBERS) is True


def test_a_set_that_is_not_known_in_full_proves_nothing(session: Session) -> None:
    add(session, "file-t", {"sport": 5}, cut=True)
    add(session, "file-v", {"tech": 2})
    assert judge(session, SPEC, CLASSES) is True


def test_a_job_waits_until_every_file_is_linted(session: Session) -> None:
    add(session, "file-t", {"sport": 5})
    add(session, "file-v", {"tech": 2})
    file = session.get(File, "file-v")
    assert file is not None
    file.status = FileStatus.UPLOADED
    assert judge(session, SPEC, CLASSES) is None


def test_rows_of_another_form_are_refused(session: Session) -> None:
    add(session, "file-t", {"sport": 5})
    add(session, "file-v", {"sport": 2})
    problem = judge(session, SPEC, DataDemand(frozenset({"chat", "text"})))
    assert isinstance(problem, Problem)
    assert problem.param == "training_file"
    assert "trains on chat, text rows" in problem.message
