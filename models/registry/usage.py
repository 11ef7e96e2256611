"""What was used, added up by day: tokens served and trained, time on devices."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Insert, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from models.db import db_now
from models.tables import Usage

DAY_SECONDS = 86_400
_COUNTERS = ("requests", "prompt_tokens", "completion_tokens", "trained_tokens", "device_seconds")


@dataclass(slots=True)
class Used:
    """An amount; `device_seconds` counts each device of a job."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    trained_tokens: int = 0
    device_seconds: float = 0.0

    def __iadd__(self, other: "Used") -> "Used":
        for name in _COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens + self.trained_tokens


@dataclass(frozen=True, slots=True)
class User:
    """Whom an amount is counted for."""

    project_id: str
    key_id: str | None
    model: str


def today(session: Session) -> int:
    """Return the day of the database's clock, in days since 1970 (UTC)."""
    return int((session.scalar(select(db_now())) or 0.0) // DAY_SECONDS)


def add(session: Session, amounts: Iterable[tuple[User, Used]]) -> None:
    """Add amounts to today's; in one statement each, so that concurrent ones are not lost."""
    day = today(session)
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    # In one order everywhere: two transactions that lock the same rows must not meet crosswise.
    for user, used in sorted(amounts, key=lambda each: (each[0].key_id or "", each[0].model)):
        new = insert(Usage).values(
            project_id=user.project_id,
            day=day,
            key_id=user.key_id or "",
            model=user.model,
            **{name: getattr(used, name) for name in _COUNTERS},
        )
        summed = {name: getattr(Usage, name) + new.excluded[name] for name in _COUNTERS}
        statement: Insert = new.on_conflict_do_update(
            index_elements=list(Usage.__table__.primary_key), set_=summed
        )
        session.execute(statement)


def by_day(
    session: Session, project_ids: Sequence[str], first_day: int, last_day: int
) -> Sequence[Usage]:
    """Return the usage of projects from `first_day` to `last_day`, both included, in order."""
    return session.scalars(
        select(Usage)
        .where(Usage.project_id.in_(project_ids), Usage.day.between(first_day, last_day))
        .order_by(Usage.day, Usage.project_id, Usage.model, Usage.key_id)
    ).all()


def total(session: Session, project_id: str, first_day: int) -> Used:
    """Return all that a project has used since a day, that day included."""
    sums = [func.coalesce(func.sum(getattr(Usage, name)), 0) for name in _COUNTERS]
    row = session.execute(
        select(*sums).where(Usage.project_id == project_id, Usage.day >= first_day)
    ).one()
    return Used(int(row[0]), int(row[1]), int(row[2]), int(row[3]), float(row[4]))
