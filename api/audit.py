"""Notes of changes for the audit log."""

from typing import Any

from sqlalchemy.orm import Session
from structlog.contextvars import get_contextvars

from api.deps import Caller
from models.registry import audit
from models.registry.audit import Change


def note(session: Session, caller: Caller, type_: str, object_id: str, /, **details: Any) -> None:
    """Record a change of the caller's in its own project, in the transaction that makes it.

    Args:
        session: That of the change.
        caller: Who makes it.
        type_: What kind of change, e.g. ``api_key.created`` (OpenAI's names where it has one).
        object_id: What was changed.
        details: Anything worth reading later; never a secret.
    """
    note_in(session, caller, caller.project_id, (type_, object_id), **details)


def note_in(
    session: Session, caller: Caller, project_id: str, what: tuple[str, str], /, **details: Any
) -> None:
    """Record a change that the caller makes in a project, which may be another than its own.

    Args:
        session: That of the change.
        caller: Who makes it.
        project_id: Where it is made.
        what: The kind of change and what was changed.
        details: As in `note`.
    """
    audit.record(session, change(caller, project_id, what, **details))


def change(caller: Caller, project_id: str, what: tuple[str, str], /, **details: Any) -> Change:
    """Return what `note_in` records, with the id of the request that is being answered."""
    type_, object_id = what
    return Change(
        project_id=project_id,
        key_id=caller.key_id,
        request_id=get_contextvars().get("request_id"),
        type=type_,
        object_id=object_id,
        details=details or None,
    )
