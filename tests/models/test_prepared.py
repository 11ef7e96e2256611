"""Prepared statements: the same rows and the same errors as from a session, on both databases."""

from pathlib import Path

import pytest
from sqlalchemy import bindparam, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from models.db import Database
from models.prepared import PreparedInsert, PreparedQuery, PreparedRows, reading_once
from models.registry import audit, tenancy
from models.settings import DatabaseSettings
from models.tables import AuditLog, Project

by_name = PreparedRows(Project, select(Project).where(Project.name == bindparam("name")))


@pytest.fixture
def project(database: Database) -> str:
    with database.write() as session:
        return tenancy.create_project(session, "team").id


def test_a_row_has_the_columns_that_a_session_reads(database: Database, project: str) -> None:
    (found,) = by_name.all(database, name="team")
    with database.read() as session:
        (inside,) = by_name.all(session, name="team")
        row = session.get_one(Project, project)
        for column in Project.__table__.columns:
            value = getattr(row, column.key)
            assert (getattr(found, column.key), getattr(inside, column.key)) == (value, value)


def test_rows_are_inserted_with_defaults_and_json(database: Database, project: str) -> None:
    insert = PreparedInsert(AuditLog)
    entries = [
        {"id": f"log-{n}", "project_id": project, "type": "x", "object_id": "y", "details": details}
        for n, details in enumerate(({"a": [1, "é"]}, None))
    ]
    with database.write() as session:
        insert.add(session, *entries)
    with database.read() as session:
        first, second = session.scalars(select(AuditLog).order_by(AuditLog.id)).all()
        empty = select(AuditLog.id).where(AuditLog.details.is_(None))
        assert session.scalars(empty).all() == ["log-1"]
    assert (first.details, second.details, second.key_id) == ({"a": [1, "é"]}, None, None)
    assert first.created_at > 1.7e9


def test_what_a_session_has_written_is_seen_and_rolled_back(
    database: Database, project: str
) -> None:
    def fail() -> None:
        with database.write() as session:
            audit.record(session, audit.Change(project, "x", "y"))
            assert count.fetch(session)
            raise RuntimeError

    count = PreparedQuery(select(AuditLog.id))
    with pytest.raises(RuntimeError):
        fail()
    assert not count.fetch(database)


def test_errors_are_those_of_a_session(database: Database, project: str) -> None:
    insert = PreparedInsert(AuditLog)
    entry = {"id": "log-1", "project_id": project, "type": "x", "object_id": "y"}
    with pytest.raises(IntegrityError), database.write() as session:
        insert.add(session, entry, entry)
    assert not PreparedQuery(select(AuditLog.id)).fetch(database)


def test_a_missing_table_is_an_error_of_sqlalchemy(tmp_path: Path) -> None:
    with pytest.raises(SQLAlchemyError, match="no such table"):
        by_name.all(Database(DatabaseSettings(url=f"sqlite:///{tmp_path / 'x'}")), name="team")


def test_within_a_block_a_query_of_the_same_values_is_asked_once(
    database: Database, project: str
) -> None:
    with database.read() as session:
        with reading_once(session):
            first = by_name.all(session, name="team")
            assert by_name.all(session, name="team") is first
            assert by_name.all(session, name="other") == []
        assert by_name.all(session, name="team") is not first
