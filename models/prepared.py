"""Queries that are compiled once: for the few reads that are asked for thousands of times.

SQLAlchemy's unit of work costs ten times what SQLite takes to find one row by its key. These skip
it: the statement is compiled by SQLAlchemy, run by the driver, and its rows are made into objects
that nobody can change or save.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Generic, TypeVar

from sqlalchemy import Dialect, Select
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler

from models.db import Database
from models.tables import Base

Row = TypeVar("Row", bound=Base)


class Prepared(Generic[Row]):
    """All columns of the rows of one table that a statement finds.

    Args:
        table: Class of the rows.
        statement: ``select(table)`` with a ``bindparam`` of a plain type for each thing that
            differs between calls.
    """

    def __init__(self, table: type[Row], statement: Select[Row]) -> None:
        self._table = table
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def all(self, database: Database, **values: object) -> Sequence[Row]:
        """Return the rows: objects of no session, of which only the columns can be read.

        Raises:
            DBAPIError: the same subclasses as from a session.
        """
        dialect = database.engine.dialect
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = self._compiled[dialect.name] = _Compiled(self._statement, dialect)
        return [self._row(compiled, row) for row in compiled.fetch(database, values)]

    def _row(self, compiled: "_Compiled", found: Sequence[Any]) -> Row:
        row = self._table.__new__(self._table)
        columns = row.__dict__
        columns.update(zip(compiled.names, found, strict=True))
        for name, process in compiled.processors:
            columns[name] = process(columns[name])
        return row


class _Compiled:
    """A statement in one dialect."""

    def __init__(self, statement: Select[Any], dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        assert isinstance(compiled, SQLCompiler)
        self.text = str(compiled)
        self._fixed = dict(compiled.params)
        self._order = compiled.positiontup
        columns = statement.selected_columns
        self.names = [column.key for column in columns]
        self.processors: list[tuple[str, Callable[[Any], Any]]] = [
            (str(column.key), process)
            for column in columns
            if (process := column.type.dialect_impl(dialect).result_processor(dialect, None))
        ]

    def fetch(self, database: Database, values: dict[str, object]) -> Sequence[Sequence[Any]]:
        parameters: Any = self._fixed | values
        if self._order is not None:
            parameters = [parameters[name] for name in self._order]
        dialect = database.engine.dialect
        with closing(database.engine.raw_connection()) as connection:
            cursor: DBAPICursor = connection.cursor()
            try:
                cursor.execute(self.text, parameters)
                return cursor.fetchall()
            except dialect.loaded_dbapi.Error as error:
                raise DBAPIError.instance(
                    self.text, None, error, dialect.loaded_dbapi.Error, dialect=dialect
                ) from error
            finally:
                cursor.close()
