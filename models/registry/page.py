"""Keyset pagination: a page starts after the row that the client saw last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from models.errors import InvalidRequestError
from models.tables import Base

Row = TypeVar("Row", bound=Base)
Order = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    rows: Sequence[Row]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page starts: at most `limit` rows after the row with id `after`."""

    after: str | None = None
    limit: int = 20
    order: Order = "desc"


def page(
    session: Session,
    query: Select[Row],
    table: type[Row],
    keys: tuple[InstrumentedAttribute[Any], ...],
    cursor: Cursor,
) -> Page[Row]:
    """Run `query` for one page, ordered by `keys`, whose last column is the row's public id.

    Raises:
        InvalidRequestError: `cursor.after` names no row of this query.
    """
    if cursor.after is not None:
        start = session.execute(
            query.with_only_columns(*keys).where(keys[-1] == cursor.after)
        ).first()
        if start is None:
            raise InvalidRequestError(
                f"'after' is {cursor.after!r}, which is no item of this list.", param="after"
            )
        position: ColumnElement[Any] = tuple_(*keys)
        bound = tuple_(*start)
        query = query.where(position > bound if cursor.order == "asc" else position < bound)
    ordering = [key.asc() if cursor.order == "asc" else key.desc() for key in keys]
    rows = session.scalars(query.order_by(*ordering).limit(cursor.limit + 1)).all()
    return Page(rows[: cursor.limit], len(rows) > cursor.limit)
