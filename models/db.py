"""The database: one engine a process, one transaction a request or task, committed at the edge."""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import orjson
from sqlalchemy import Connection, Double, Engine, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.sql.functions import FunctionElement

from models.settings import DatabaseSettings

SQLITE_BUSY_SECONDS = 30
IDLE_TRANSACTION_SECONDS = 15

_Result = TypeVar("_Result")
_AFTER_COMMIT = "after_commit"


def after_commit(session: Session, name: str, action: Callable[[], None]) -> None:
    """Run `action` once the surrounding `Database.write` has committed; one action for each `name`.

    Not SQLAlchemy's event of that name, which also fires when a savepoint is released.
    """
    session.info.setdefault(_AFTER_COMMIT, {})[name] = action


class db_now(FunctionElement[float]):
    """The database's clock, in seconds since 1970: leases must not depend on a worker's clock."""

    type = Double()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: Any, **_: Any) -> str:
    return "(julianday('now') * 86400.0 - 210866760000.0)"


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: Any, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


@dataclass(frozen=True, slots=True)
class Outcome(Generic[_Result]):
    """What a function returned, or the exception that it raised instead."""

    result: _Result | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, run: Callable[[], _Result]) -> "Outcome[_Result]":
        """Run it; the exception is for whoever it belongs to, and stops nobody else."""
        try:
            return cls(run())
        except Exception as error:  # noqa: BLE001 (kept, not swallowed)
            return cls(error=error)


class Database:
    """An engine and the two kinds of transactions.

    SQLite begins a writing transaction with ``BEGIN IMMEDIATE``: a deferred one that reads first
    and writes later fails with "database is locked" as soon as two of them meet. The writers of
    one process queue at a lock of their own, since SQLite's waiters sleep and try again.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        self.engine = _create_engine(settings)
        self._reader = self.engine.execution_options(sqlite_begin="BEGIN")
        self._watcher: PoolProxiedConnection | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether the database is a file of this machine: what it does takes no network."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits when the block ends and rolls back when it raises.

        What was registered with `after_commit` runs after the commit, and never after a rollback.
        """
        with Session(self.engine, expire_on_commit=False) as session:
            with session.begin():
                yield session
            _run_actions(session)

    def write_together(self, writes: Sequence[Callable[[Session], Any]]) -> list[Outcome[Any]]:
        """Carry out several writes in one transaction; return the outcome of each.

        Each has a session of its own, and a savepoint where there are others: of one that raises
        nothing is kept, and the others do not notice.

        Raises:
            DBAPIError: the commit of all of them failed.
        """
        if len(writes) == 1:  # it is the transaction
            return [self._write_alone(writes[0])]
        with self.engine.begin() as connection:
            sessions = [
                Session(
                    connection, join_transaction_mode="create_savepoint", expire_on_commit=False
                )
                for _ in writes
            ]
            outcomes = [
                Outcome.of(partial(_write_within, session, write))
                for session, write in zip(sessions, writes, strict=True)
            ]
        for index, session in enumerate(sessions):
            if outcomes[index].error is None:
                told = Outcome.of(partial(_run_actions, session))
                outcomes[index] = outcomes[index] if told.error is None else told
        return outcomes

    def _write_alone(self, write: Callable[[Session], _Result]) -> Outcome[_Result]:
        outcome: Outcome[_Result] = Outcome()
        try:
            with self.write() as session:
                outcome = Outcome.of(partial(write, session))
                if outcome.error is not None:
                    raise outcome.error
        except Exception as error:
            if error is not outcome.error:  # it is of the commit
                raise
        return outcome

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading; whatever it changes is rolled back."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    def version(self) -> int | None:
        """Return a number that every commit changes, of any process; None where asking takes long.

        Only for one thread: SQLite compares with what one connection was told before.
        """
        if not self.is_embedded:
            return None
        if self._watcher is None:
            self._watcher = self.engine.raw_connection()
        # Asked of the driver: the pool's proxy would take longer than the answer.
        connection = self._watcher.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        number: int = connection.execute("PRAGMA data_version").fetchone()[0]
        return number

    def is_reachable(self) -> bool:
        try:
            with self.engine.connect():
                return True
        except OperationalError:
            return False

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        self.engine.dispose()


def _write_within(session: Session, write: Callable[[Session], _Result]) -> _Result:
    with session, session.begin():
        return write(session)


def _run_actions(session: Session) -> None:
    for action in session.info.pop(_AFTER_COMMIT, {}).values():
        action()


def _create_engine(settings: DatabaseSettings) -> Engine:
    if settings.url.startswith("sqlite"):
        return _create_sqlite(settings)
    engine = create_engine(
        settings.url,
        pool_size=settings.pool_size,
        pool_pre_ping=True,
        json_deserializer=orjson.loads,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        # A process that is frozen inside a transaction must not keep its locks from the others.
        limit = f"SET idle_in_transaction_session_timeout = '{IDLE_TRANSACTION_SECONDS}s'"
        connection.execute(limit)
        connection.commit()

    return engine


def _json(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def _create_sqlite(settings: DatabaseSettings) -> Engine:
    engine = create_engine(
        settings.url,
        pool_size=settings.pool_size,
        max_overflow=40,
        connect_args={"timeout": SQLITE_BUSY_SECONDS, "check_same_thread": False},
        json_serializer=_json,
        json_deserializer=orjson.loads,
        pool_reset_on_return=None,  # sessions have rolled back when they give a connection back
    )
    writer = threading.Lock()

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # this module begins transactions, not the driver
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            f"busy_timeout = {SQLITE_BUSY_SECONDS * 1000}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        how = connection.get_execution_options().get("sqlite_begin", "BEGIN IMMEDIATE")
        if how == "BEGIN":
            connection.connection.cursor().execute(how)  # it never waits, and so never fails
            return
        if not connection.info.get("is_writer"):
            connection.info["is_writer"] = writer.acquire(timeout=SQLITE_BUSY_SECONDS)
        connection.exec_driver_sql(how)

    @event.listens_for(engine, "checkin")
    def end(_: Any, record: ConnectionPoolEntry) -> None:
        if record.info.pop("is_writer", False):
            writer.release()

    return engine
