"""Statements that are compiled once: for the few things that are done thousands of times.

SQLAlchemy's unit of work costs ten times what SQLite takes to find one row by its key. These skip
it: a statement is compiled by SQLAlchemy and run by the driver.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar, cast

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
_KNOWN, _CONNECTION = "prepared_rows", "prepared_connection"


@contextmanager
def reading_once(session: Session) -> Iterator[None]:
    """Within the block a prepared ``select`` is carried out once for the same values.

    For what many parts of a transaction ask again and none of them changes. The session stays in
    its transaction.
    """
    session.info[_KNOWN] = {}
    session.info[_CONNECTION] = session.connection().connection  # which takes as long as a query
    try:
        yield
    finally:
        del session.info[_KNOWN], session.info[_CONNECTION]


def _known(source: "Source") -> dict[object, Any] | None:
    known: dict[object, Any] | None = (
        source.info.get(_KNOWN) if isinstance(source, Session) else None
    )
    return known


def row_of(table: type[Row], columns: Mapping[str, object]) -> Row:
    """Return an object of no session, of which only the columns can be read."""
    row = table.__new__(table)
    row.__dict__.update(columns)
    return row


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
        self.names = [str(column.key) for column in columns]
        self._types = [column.type for column in columns]
        self._processors: dict[str, list[tuple[str, Process]]] = {}

    def all(self, source: Source, **values: object) -> Sequence[Row]:
        """Return the rows: objects of no session, of which only the columns can be read.

        Raises:
            DBAPIError: the same subclasses as from a session.
        """
        known = _known(source)
        if known is None:
            return self._all(source, values)
        key = (self, *values.items())
        if key not in known:
            known[key] = self._all(source, values)
        rows: Sequence[Row] = known[key]
        return rows

    def raw(self, source: Source, **values: object) -> Sequence[tuple[Any, ...]]:
        """Return the rows as the driver gives them, in the order of `names`."""
        return cast("Sequence[tuple[Any, ...]]", self._query.fetch(source, **values))

    def row(self, database: Database, columns: tuple[Any, ...]) -> Row:
        """Return the object of a row of `raw` of SQLite, whose driver has no codes of types."""
        dialect = _dialect(database)
        processors = self._processors.get(dialect.name)
        if processors is None:
            processors = self._prepare(dialect, [None] * len(self.names))
        return self._row(columns, processors)

    def _prepare(self, dialect: Dialect, codes: Sequence[Any]) -> list[tuple[str, Process]]:
        processors = self._processors[dialect.name] = [
            (name, process)
            for name, type_, code in zip(self.names, self._types, codes, strict=True)
            if (process := type_.dialect_impl(dialect).result_processor(dialect, code))
        ]
        return processors

    def _all(self, source: Source, values: dict[str, object]) -> Sequence[Row]:
        rows, codes = self._query.fetch_typed(source, values)
        dialect = _dialect(source)
        processors = self._processors.get(dialect.name)
        if processors is None:
            processors = self._prepare(dialect, codes)
        return [self._row(found, processors) for found in rows]

    def _row(self, found: Sequence[Any], processors: list[tuple[str, Process]]) -> Row:
        row = row_of(self._table, dict(zip(self.names, found, strict=True)))
        columns = row.__dict__
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
        known = _known(source)
        if known is None:
            return self.fetch_typed(source, values)[0]
        key = (self, *values.items())
        if key not in known:
            known[key] = self.fetch_typed(source, values)[0]
        rows: Sequence[Sequence[Any]] = known[key]
        return rows

    def fetch_typed(
        self, source: Source, values: dict[str, object]
    ) -> tuple[Sequence[Sequence[Any]], list[Any]]:
        """Return the rows, and the driver's codes of the types of their columns."""
        dialect = _dialect(source)
        if dialect.name not in self._compiled:
            self._compiled[dialect.name] = _Compiled(self._statement, dialect)
        compiled = self._compiled[dialect.name]
        with compiled.run(source, [compiled.parameters(values)]) as cursor:
            return cursor.fetchall(), [column[1] for column in cursor.description]


class PreparedInsert:
    """Whole rows into a table whose objects nobody needs afterwards.

    A column that is not given gets its default; one whose default is an expression, such as the
    database's clock, cannot be given unless it is in `given`, and then it must be. `names` are
    those that can.
    """

    def __init__(self, table: type[Base], given: Collection[str] = ()) -> None:
        assert isinstance(table.__table__, Table)
        computed = {
            column.name: column.default.arg
            for column in table.__table__.columns
            if column.default is not None
            and column.default.is_clause_element
            and column.name not in given
        }
        plain = [column for column in table.__table__.columns if column.name not in computed]
        named = {column.name: bindparam(f"p_{column.name}", type_=column.type) for column in plain}
        self._statement = insert(table.__table__).values({**named, **computed})
        self.names = tuple(named)
        self._columns = {f"p_{name}": name for name in self.names}
        self._empty: dict[str, object] = dict.fromkeys(named)
        self._empty |= {
            column.name: column.default.arg
            for column in plain
            if column.default is not None and column.default.is_scalar
        }
        self._types = {column.name: column.type for column in plain}
        self._prepared: dict[str, _PreparedInsert] = {}

    def add(self, session: Session, *rows: Mapping[str, object]) -> None:
        """Insert rows given by the names of columns; raises as `PreparedRows.all`."""
        dialect = _dialect(session)
        if dialect.name not in self._prepared:
            self._prepared[dialect.name] = self._prepare(dialect)
        compiled, processors, parameters = self._prepared[dialect.name]
        if not rows:
            return
        made = []
        for row in rows:
            full = self.whole(row)
            for name, process in processors.items():
                full[name] = process(full[name])
            made.append(parameters(full))
        with compiled.run(session, made):
            pass

    def _prepare(self, dialect: Dialect) -> "_PreparedInsert":
        processors = {
            name: process
            for name, type_ in self._types.items()
            if (process := type_.dialect_impl(dialect).bind_processor(dialect))
        }
        compiled = _Compiled(self._statement, dialect)
        if compiled.order is not None and self._columns.keys() >= set(compiled.order):
            in_order = itemgetter(*(self._columns[name] for name in compiled.order))
            return _PreparedInsert(compiled, processors, in_order)

        def named(row: Mapping[str, object]) -> Any:
            return compiled.parameters({key: row[name] for key, name in self._columns.items()})

        return _PreparedInsert(compiled, processors, named)

    def whole(self, row: Mapping[str, object]) -> dict[str, object]:
        """Return a row with the defaults of the columns that it does not give.

        Raises:
            KeyError: it gives a column that cannot be given.
        """
        if not row.keys() <= self._empty.keys():
            raise KeyError(f"No columns that can be given: {row.keys() - self._empty.keys()}.")
        return {**self._empty, **row}


class _Compiled:
    """A statement in one dialect.

    Attributes:
        order: Names of its parameters if the driver takes them in an order, else None.
    """

    def __init__(self, statement: Select[*tuple[Any, ...]] | Insert, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        assert isinstance(compiled, SQLCompiler)
        self._text = str(compiled)
        self._fixed = dict(compiled.params)
        self.order = compiled.positiontup

    @contextmanager
    def run(self, source: Source, parameters: Sequence[Any]) -> Iterator[DBAPICursor]:
        """Run it once for each of the results of `parameters`; yields the cursor."""
        error_class = _dialect(source).loaded_dbapi.Error
        with _cursor(source) as cursor:
            try:
                if len(parameters) == 1:
                    cursor.execute(self._text, parameters[0])
                else:
                    cursor.executemany(self._text, parameters)
                yield cursor
            except error_class as error:
                raise DBAPIError.instance(self._text, None, error, error_class) from error

    def parameters(self, values: dict[str, object]) -> Any:
        """Return values, given by the names of parameters, in the form that the driver takes."""
        named = self._fixed | values
        return named if self.order is None else [named[name] for name in self.order]


class _PreparedInsert(NamedTuple):
    compiled: _Compiled
    processors: Mapping[str, Process]
    parameters: Callable[[Mapping[str, object]], Any]
    """Of a whole row, in the form that the driver takes."""


def _dialect(source: Source) -> Dialect:
    return source.engine.dialect if isinstance(source, Database) else source.get_bind().dialect


@contextmanager
def _cursor(source: Source) -> Iterator[DBAPICursor]:
    if isinstance(source, Session):
        source.flush()  # as before a query of its own
        connection = source.info.get(_CONNECTION) or source.connection().connection
        with closing(connection.cursor()) as cursor:
            yield cursor
    else:
        with (
            closing(source.engine.raw_connection()) as connection,
            closing(connection.cursor()) as cursor,
        ):
            yield cursor
