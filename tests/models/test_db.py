"""Transactions: what is registered for after the commit runs then, once, and only then."""

import time
from pathlib import Path

import pytest
from sqlalchemy import select, text

from models.db import IDLE_TRANSACTION_SECONDS, Database, after_commit, db_now
from models.settings import DatabaseSettings


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(DatabaseSettings(url=f"sqlite:///{tmp_path / 'x.db'}"))


def test_an_action_runs_once_after_the_commit(database: Database) -> None:
    ran: list[int] = []
    with database.write() as session:
        for number in (1, 2):
            after_commit(session, "bell", lambda number=number: ran.append(number))  # type: ignore[misc]
        assert ran == []
    assert ran == [2]


def test_an_action_is_dropped_with_a_rollback(database: Database) -> None:
    ran: list[int] = []

    def fail() -> None:
        with database.write() as session:
            after_commit(session, "bell", lambda: ran.append(1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert ran == []


def test_the_databases_clock_is_in_unix_seconds(database: Database) -> None:
    with database.read() as session:
        now = session.scalar(select(db_now()))
    assert now == pytest.approx(time.time(), abs=5)


def test_a_frozen_client_does_not_keep_its_locks_in_postgresql_for_ever(postgres_url: str) -> None:
    server = Database(DatabaseSettings(url=postgres_url))
    with server.write() as session:
        limit = session.scalar(text("SHOW idle_in_transaction_session_timeout"))
    server.close()
    assert limit == f"{IDLE_TRANSACTION_SECONDS}s"
