"""The audit log: who changed what, in the same transaction as the change."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from models.prepared import PreparedInsert
from models.registry.page import Cursor, Page, page
from models.tables import AuditLog, new_id

_insert = PreparedInsert(AuditLog)


def record(session: Session, *entries: AuditLog) -> None:
    """Add entries; the `id` of each is set here, its time by the database."""
    for entry in entries:
        entry.id = new_id("audit_log-")
    _insert.add(
        session, *({name: getattr(entry, name) for name in _insert.names} for entry in entries)
    )


def list_page(
    session: Session,
    project_id: str,
    cursor: Cursor,
    *,
    types: Sequence[str] = (),
    key_ids: Sequence[str] = (),
) -> Page[AuditLog]:
    """Return entries newest first: all, those of some types, those of some keys."""
    query = select(AuditLog).where(AuditLog.project_id == project_id)
    if types:
        query = query.where(AuditLog.type.in_(types))
    if key_ids:
        query = query.where(AuditLog.key_id.in_(key_ids))
    return page(session, query, AuditLog, (AuditLog.created_at, AuditLog.id), cursor)
