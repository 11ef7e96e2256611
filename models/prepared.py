"""Statements that are compiled once: for the few things that are done thousands of times.

SQLAlchemy's unit of work costs ten times what SQLite takes to find one row by its key. These skip
it: a statement is compiled by SQLAlchemy and run by the driver.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Generic, TypeVar

from sqlalchemy import Dialect, Select, Table, bindparam, insert
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import Insert

from models.db import Database
from models.tables import Base

Row = TypeVar("Row", bound=Base)
Source = Database | Session
"""Where a statement runs: by itself, or within the transaction of a session."""
Process = Callable[[Any], Any]


class PreparedRows(Generic[Row]):
    """All columns of the rows of one table that a statement finds.

    Args:
        table: Class of the rows.
        statement: ``select(table)`` with a ``bindparam`` for each plain value that differs between
            calls.
    """

    def __init__(self, table: type[Row], statement: Select[Row]) -> None:
        self._table = table
        self._query = PreparedQuery(statement)
        columns = list(statement.selected_columns)
        self._names = [str(column.key) for column in columns]
        self._types = [column.type for column in columns]
        self._processors: dict[str, list[tuple[str, Process]]] = {}

    def all(self, source: Source, **values: object) -> Sequence[Row]:
        """Return the rows: objects of no session, of which only the columns can be read.

        Raises:
            DBAPIError: the same subclasses as from a session.
        """
        rows, codes = self._query.fetch_typed(source, values)
        dialect = _dialect(source)
        processors = self._processors.get(dialect.name)
        if processors is None:
            processors = self._processors[dialect.name] = [
                (name, process)
                for name, type_, code in zip(self._names, self._types, codes, strict=True)
                if (process := type_.dialect_impl(dialect).result_processor(dialect, code))
            ]
        return [self._row(found, processors) for found in rows]

    def _row(self, found: Sequence[Any], processors: list[tuple[str, Process]]) -> Row:
        row = self._table.__new__(self._table)
        columns = row.__dict__
        columns.update(zip(self._names, found, strict=True))
        for name, process in processors:
            columns[name] = process(columns[name])
        return row


class PreparedQuery:
    """Any ``select``; its rows come as the driver gives them."""

    def __init__(self, statement: Select[*tuple[Any, ...]]) -> None:
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def fetch(self, source: Source, **values: object) -> Sequence[Sequence[Any]]:
        """Return the rows; raises as `PreparedRows.all`."""
        return self.fetch_typed(source, values)[0]

    def fetch_typed(
        self, source: Source, values: dict[str, object]
    ) -> tuple[Sequence[Sequence[Any]], list[Any]]:
        """Return the rows, and the driver's codes of the types of their columns."""
        dialect = _dialect(source)
        if dialect.name not in self._compiled:
            self._compiled[dialect.name] = _Compiled(self._statement, dialect)
        compiled = self._compiled[dialect.name]
        with compiled.run(source, [values]) as cursor:
            return cursor.fetchall(), [column[1] for column in cursor.description]


class PreparedInsert:
    """Whole rows into a table whose objects nobody needs afterwards.

    A column that is not given gets its default; one whose default is an expression, such as the
    database's clock, cannot be given. `names` are the others.
    """

    def __init__(self, table: type[Base]) -> None:
        assert isinstance(table.__table__, Table)
        computed = {
            column.name: column.default.arg
            for column in table.__table__.columns
            if column.default is not None and column.default.is_clause_element
        }
        plain = [column for column in table.__table__.columns if column.name not in computed]
        named = {column.name: bindparam(f"p_{column.name}", type_=column.type) for column in plain}
        self._statement = insert(table.__table__).values({**named, **computed})
        self.names = tuple(named)
        self._empty: dict[str, object] = dict.fromkeys(named)
        self._empty |= {
            column.name: column.default.arg
            for column in plain
            if column.default is not None and column.default.is_scalar
        }
        self._types = {column.name: column.type for column in plain}
        self._compiled: dict[str, tuple[_Compiled, dict[str, Process]]] = {}

    def add(self, session: Session, *rows: Mapping[str, object]) -> None:
        """Insert rows given by the names of columns; raises as `PreparedRows.all`."""
        dialect = _dialect(session)
        if dialect.name not in self._compiled:
            processors = {
                name: process
                for name, type_ in self._types.items()
                if (process := type_.dialect_impl(dialect).bind_processor(dialect))
            }
            self._compiled[dialect.name] = _Compiled(self._statement, dialect), processors
        compiled, processors = self._compiled[dialect.name]
        made = []
        for row in rows:
            if not row.keys() <= self._empty.keys():
                raise KeyError(f"No columns that can be given: {row.keys() - self._empty.keys()}.")
            full = {**self._empty, **row}
            for name, process in processors.items():
                full[name] = process(full[name])
            made.append({f"p_{name}": value for name, value in full.items()})
        with compiled.run(session, made):
            pass


class _Compiled:
    """A statement in one dialect."""

    def __init__(self, statement: Select[*tuple[Any, ...]] | Insert, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        assert isinstance(compiled, SQLCompiler)
        self._text = str(compiled)
        self._fixed = dict(compiled.params)
        self._order = compiled.positiontup

    @contextmanager
    def run(self, source: Source, values: Sequence[dict[str, object]]) -> Iterator[DBAPICursor]:
        """Run it once for each set of values; yields the cursor of the last."""
        error_class = _dialect(source).loaded_dbapi.Error
        with _cursor(source) as cursor:
            try:
                for each in values:
                    cursor.execute(self._text, self._parameters(each))
                yield cursor
            except error_class as error:
                raise DBAPIError.instance(self._text, None, error, error_class) from error

    def _parameters(self, values: dict[str, object]) -> Any:
        named = self._fixed | values
        return named if self._order is None else [named[name] for name in self._order]


def _dialect(source: Source) -> Dialect:
    return source.engine.dialect if isinstance(source, Database) else source.get_bind().dialect


@contextmanager
def _cursor(source: Source) -> Iterator[DBAPICursor]:
    if isinstance(source, Session):
        source.flush()  # as before a query of its own
        with closing(source.connection().connection.cursor()) as cursor:
            yield cursor
    else:
        with (
            closing(source.engine.raw_connection()) as connection,
            closing(connection.cursor()) as cursor,
        ):
            yield cursor
