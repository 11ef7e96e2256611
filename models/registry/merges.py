"""Merged models: wanted by an owner, made by a worker that has no job."""

from typing import Any

from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.status import MergeStatus
from models.errors import NotFoundError
from models.tables import File, Merge, new_id


def want(session: Session, project_id: str, model: str) -> tuple[Merge, bool]:
    """Ask for a merged model; return its merge, and whether that is new.

    It is not where one is being made, or its file is still there.
    """
    found = latest(session, project_id, model)
    if found is not None and found.status in (MergeStatus.QUEUED, MergeStatus.RUNNING):
        return found, False
    if found is not None and found.file_id and session.get(File, found.file_id) is not None:
        return found, False
    merge = Merge(
        id=new_id("merge-"), project_id=project_id, model=model, status=MergeStatus.QUEUED
    )
    session.add(merge)
    session.flush()
    return merge, True


def latest(session: Session, project_id: str, model: str) -> Merge | None:
    return session.scalar(
        select(Merge)
        .where(Merge.project_id == project_id, Merge.model == model)
        .order_by(Merge.created_at.desc(), Merge.id)
        .limit(1)
    )


def get(session: Session, project_id: str, model: str) -> Merge:
    """Return the newest merge of a model, or raise `NotFoundError`."""
    found = latest(session, project_id, model)
    if found is None:
        raise NotFoundError(
            f"{model!r} has not been merged. Ask for it with POST.", param="model", code="no_merge"
        )
    return found


def claim(session: Session, seconds: float) -> Merge | None:
    """Take a merge that nobody makes; for `seconds` no other worker will."""
    lost = and_(Merge.status == MergeStatus.RUNNING, Merge.claimed_until < db_now())
    merge = session.scalar(
        select(Merge)
        .where(or_(Merge.status == MergeStatus.QUEUED, lost))
        .order_by(Merge.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if merge is not None:
        until = db_now() + seconds
        _write(session, merge.id, status=MergeStatus.RUNNING, claimed_until=until)
        session.refresh(merge)  # the caller reads it when the session is over
    return merge


def give_back(session: Session, merge_id: str) -> None:
    """Leave a merge to be made later."""
    _write(session, merge_id, status=MergeStatus.QUEUED, claimed_until=None)


def succeed(session: Session, merge_id: str, file_id: str) -> None:
    """End a merge; its file is there."""
    _end(session, merge_id, status=MergeStatus.SUCCEEDED, file_id=file_id)


def fail(session: Session, merge_id: str, reason: str) -> None:
    """End a merge for a reason; one that has ended stays as it is."""
    _end(session, merge_id, status=MergeStatus.FAILED, error=reason)


def _end(session: Session, merge_id: str, **values: Any) -> None:
    _write(session, merge_id, claimed_until=None, **values)


def _write(session: Session, merge_id: str, **values: Any) -> None:
    open_ = Merge.status.in_((MergeStatus.QUEUED, MergeStatus.RUNNING))
    session.execute(update(Merge).where(Merge.id == merge_id, open_).values(**values))
    session.expire_all()
