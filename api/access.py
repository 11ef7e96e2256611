"""Which scope a group of routes asks for, and who speaks for the whole service."""

from dataclasses import dataclass

from fastapi import Request
from sqlalchemy.orm import Session

from api.deps import CallerDep
from models.domain.access import Scope, allows
from models.errors import PermissionDeniedError
from models.registry import tenancy

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Access:
    """A dependency that refuses keys without the scope; `reads` None lets every key read.

    Raises:
        PermissionDeniedError: the key is valid and its scopes do not allow this.
    """

    reads: Scope | None
    writes: Scope

    async def __call__(self, request: Request, caller: CallerDep) -> None:
        needed = self.reads if request.method in _SAFE_METHODS else self.writes
        if needed is not None and not allows(caller.scopes, needed):
            raise PermissionDeniedError(
                f"This key has the scopes {', '.join(caller.scopes)}; this call needs '{needed}'. "
                "Use another key, or have one made by an admin key."
            )


TRAINING = Access(reads=Scope.READ, writes=Scope.TRAIN)
MODELS = Access(reads=None, writes=Scope.TRAIN)
INFERENCE = Access(reads=Scope.INFER, writes=Scope.INFER)
ADMINISTRATION = Access(reads=Scope.ADMIN, writes=Scope.ADMIN)


def is_operator(session: Session, project_id: str) -> bool:
    """Say whether keys of a project speak for the service: it is the one that was there first."""
    return tenancy.get_project(session, project_id).name == tenancy.DEFAULT_PROJECT
