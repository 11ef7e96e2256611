"""Measurements of base models, made by workers that have no job, and what jobs showed since."""

from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.estimates import Corrections, Measured, Probe, corrections_from
from models.domain.status import JobStatus
from models.tables import BaseProbe, Job

LEARNED_FROM = 20
"""So many of the newest jobs correct an estimate."""


def get(session: Session, base_model: str, precision: str) -> BaseProbe | None:
    return session.get(BaseProbe, (base_model, precision))


def want(session: Session, base_model: str, precision: str) -> None:
    """Ask for a measurement; a worker makes it as soon as it has no job."""
    if get(session, base_model, precision) is not None:
        return
    try:
        with session.begin_nested():
            session.add(BaseProbe(base_model=base_model, precision=precision))
    except IntegrityError:
        return  # somebody else has asked in this moment


def claim(session: Session, seconds: float) -> BaseProbe | None:
    """Take a measurement that nobody makes; for `seconds` no other worker will."""
    row = session.scalar(
        select(BaseProbe)
        .where(
            BaseProbe.values.is_(None),
            BaseProbe.failure.is_(None),
            or_(BaseProbe.claimed_until.is_(None), BaseProbe.claimed_until < db_now()),
        )
        .order_by(BaseProbe.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if row is not None:
        _write(session, row, claimed_until=db_now() + seconds)
    return row


def _write(session: Session, row: BaseProbe, **values: Any) -> None:
    session.execute(
        update(BaseProbe)
        .where(BaseProbe.base_model == row.base_model, BaseProbe.precision == row.precision)
        .values(**values)
    )


def record(session: Session, row: BaseProbe, measured: Probe) -> None:
    _write(session, row, values=measured.model_dump(mode="json"), claimed_until=None)


def give_back(session: Session, row: BaseProbe) -> None:
    """Leave a measurement to be made later."""
    _write(session, row, claimed_until=None)


def record_failure(session: Session, row: BaseProbe, reason: str) -> None:
    _write(session, row, failure=reason, claimed_until=None)


def corrections(session: Session, base_model: str, precision: str, device: str) -> Corrections:
    """Return what the newest jobs on this base, precision and device have shown."""
    rows = session.scalars(
        select(Job.measured)
        .where(
            Job.base_model == base_model,
            Job.status == JobStatus.SUCCEEDED,
            Job.measured["precision"].as_string() == precision,
            Job.measured["device"].as_string() == device,
        )
        .order_by(Job.finished_at.desc())
        .limit(LEARNED_FROM)
    )
    return corrections_from([Measured.model_validate(row) for row in rows])
