"""The audit log: who changed what, in the same transaction as the change."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from models.domain.base import JsonObject
from models.prepared import PreparedInsert
from models.registry.page import Cursor, Page, page
from models.tables import AuditLog, ordered_id

_insert = PreparedInsert(AuditLog)


@dataclass(frozen=True, slots=True)
class Change:
    """A change to be noted.

    `key_id` is None for what the operator did from the command line; `details` never has a secret.
    """

    project_id: str
    type: str
    object_id: str
    key_id: str | None = None
    request_id: str | None = None
    details: JsonObject | None = None

    def row(self) -> JsonObject:
        return {
            "id": ordered_id("audit_log-"),
            "project_id": self.project_id,
            "key_id": self.key_id,
            "request_id": self.request_id,
            "type": self.type,
            "object_id": self.object_id,
            "details": self.details,
        }


def record(session: Session, *changes: Change) -> None:
    """Add an entry for each change; the database sets its time."""
    _insert.add(session, *(change.row() for change in changes))


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
