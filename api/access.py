"""Which scope a group of routes asks for."""

from fastapi import Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase

from api.deps import get_caller
from models.domain.access import Scope, allows
from models.errors import PermissionDeniedError

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Access(SecurityBase):
    """A dependency that refuses keys without the scope; `reads` None lets every key read.

    It is OpenAPI's security scheme as well, so that each request has one dependency less to solve.

    Raises:
        PermissionDeniedError: the key is valid and its scopes do not allow this.
    """

    def __init__(self, reads: Scope | None, writes: Scope) -> None:
        self.model = HTTPBearer(description="An API key: `Authorization: Bearer sk-…`.")
        self.scheme_name = "HTTPBearer"
        self.reads = reads
        self.writes = writes

    async def __call__(self, request: Request) -> None:
        caller = await get_caller(request)
        needed = self.reads if request.method in _SAFE_METHODS else self.writes
        if needed is not None and not allows(caller.scopes, needed):
            raise PermissionDeniedError(
                f"This key has the scopes {', '.join(caller.scopes)}; this call needs '{needed}'. "
                "Use another key, or have one made by an admin key."
            )


READING = Access(reads=Scope.READ, writes=Scope.READ)
TRAINING = Access(reads=Scope.READ, writes=Scope.TRAIN)
MODELS = Access(reads=None, writes=Scope.TRAIN)
INFERENCE = Access(reads=Scope.INFER, writes=Scope.INFER)
ADMINISTRATION = Access(reads=Scope.ADMIN, writes=Scope.ADMIN)
