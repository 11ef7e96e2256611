"""Transactions: what is registered for after the commit runs then, once, and only then."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

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


def test_writers_of_a_process_come_one_after_the_other(database: Database) -> None:
    """Each reads and writes in one transaction, so none is lost and none is refused."""
    with database.write() as session:
        session.execute(text("CREATE TABLE counter (n INTEGER)"))
        session.execute(text("INSERT INTO counter VALUES (0)"))

    def add_one(_: int) -> None:
        with database.write() as session:
            n = session.scalar(text("SELECT n FROM counter"))
            session.execute(text("UPDATE counter SET n = :n"), {"n": (n or 0) + 1})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(40)))
    with database.read() as session:
        assert session.scalar(text("SELECT n FROM counter")) == 40


def test_a_writer_that_fails_lets_the_next_one_in(database: Database) -> None:
    with pytest.raises(OperationalError), database.write() as session:
        session.execute(text("SELECT * FROM nothing"))
    with database.write() as session:
        session.execute(text("CREATE TABLE something (n INTEGER)"))


def add_row(n: int) -> Callable[[Session], int]:
    def write(session: Session) -> int:
        session.execute(text("INSERT INTO counter VALUES (:n)"), {"n": n})
        after_commit(session, "bell", lambda: rung.append(n))
        if n < 0:
            raise ValueError(n)
        return n

    return write


rung: list[int] = []


def test_of_writes_together_one_that_fails_loses_its_own_rows_alone(database: Database) -> None:
    rung.clear()
    with database.write() as session:
        session.execute(text("CREATE TABLE counter (n INTEGER)"))
    outcomes = database.write_together([add_row(1), add_row(-2), add_row(3)])
    assert [outcome.result for outcome in outcomes] == [1, None, 3]
    assert isinstance(outcomes[1].error, ValueError)
    assert rung == [1, 3]
    with database.read() as session:
        assert session.scalars(text("SELECT n FROM counter ORDER BY n")).all() == [1, 3]


def test_of_writes_together_a_later_one_sees_what_an_earlier_one_wrote(database: Database) -> None:
    with database.write() as session:
        session.execute(text("CREATE TABLE counter (n INTEGER)"))

    def count(session: Session) -> int | None:
        return session.scalar(text("SELECT count(*) FROM counter"))

    outcomes = database.write_together([count, add_row(1), count])
    assert [outcome.result for outcome in outcomes] == [0, 1, 1]


def test_an_action_that_fails_after_the_commit_is_told_to_its_own_write(
    database: Database,
) -> None:
    def write(session: Session) -> None:
        after_commit(session, "bell", lambda: 1 / 0)  # type: ignore[arg-type]

    failed, fine = database.write_together(
        [write, lambda session: session.scalar(text("SELECT 7"))]
    )
    assert isinstance(failed.error, ZeroDivisionError)
    assert (fine.result, fine.error) == (7, None)


def test_every_commit_changes_the_version(database: Database, tmp_path: Path) -> None:
    seen = [database.version()]
    other = Database(DatabaseSettings(url=f"sqlite:///{tmp_path / 'x.db'}"))
    for writer in (database, other):
        with writer.write() as session:
            session.execute(text(f"CREATE TABLE t{len(seen)} (n INTEGER)"))
        seen += [database.version()]
    assert len(set(seen)) == 3
    assert database.version() == seen[-1]
    for each in (database, other):
        each.close()
