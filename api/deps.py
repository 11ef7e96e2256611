"""Dependencies of routes: the services, the caller, and the one transaction of a request."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from api import page_session
from api.services import Services
from models.errors import AuthenticationError
from models.registry import tenancy
from models.tables import ApiKey


async def get_services(request: Request) -> Services:  # async: it needs no thread
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


def _write_session(services: ServicesDep) -> Iterator[Session]:
    with services.database.write() as session:
        yield session


def _read_session(services: ServicesDep) -> Iterator[Session]:
    with services.database.read() as session:
        yield session


# scope="function": the commit happens before the response is sent, so that a client never holds
# a success for a row that then failed to commit.
WriteSession = Annotated[Session, Depends(_write_session, scope="function")]
ReadSession = Annotated[Session, Depends(_read_session, scope="function")]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling, from the API key."""

    project_id: str
    key_id: str
    scopes: tuple[str, ...]


INTERNAL_CALLER = "tunery.caller"
"""Key of an ASGI scope: who calls, when the service itself asks for somebody (no client can)."""

_bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer sk-…`.")


def get_caller(
    request: Request,
    services: ServicesDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """Return who calls: by a bearer key, or from the page by its cookie.

    Raises:
        AuthenticationError: neither, or not a valid one.
        PermissionDeniedError: a change by cookie that does not come from the page itself.
    """
    internal = request.scope.get(INTERNAL_CALLER)
    if isinstance(internal, Caller):
        return internal
    with services.database.read() as session:
        if credentials is not None:
            key = tenancy.authenticate(session, credentials.credentials)
            return _caller(key)
        page = page_session.read_cookie(session, request.cookies.get(page_session.COOKIE, ""))
        if page is None:
            raise AuthenticationError(
                "You didn't provide an API key. Send it in the header: 'Authorization: Bearer KEY'."
            )
        page_session.require_own_page(request, page)
        return _caller(page.key)


def _caller(key: ApiKey) -> Caller:
    return Caller(project_id=key.project_id, key_id=key.id, scopes=tuple(key.scopes))


CallerDep = Annotated[Caller, Depends(get_caller)]

After = Annotated[str | None, Query(description="Id of the last item of the previous page.")]
