"""Dependencies of routes: the services, the caller, and the one transaction of a request."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api import page_session
from api.rates import Verdict
from api.services import Services
from models.db import Database
from models.errors import AuthenticationError
from models.registry import quotas, tenancy
from models.registry.usage import User
from models.tables import ApiKey

_Result = TypeVar("_Result")


async def get_services(request: Request) -> Services:  # async: it needs no thread
    return _services(request)


def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


# These take the request, not `ServicesDep`: a dependency of a dependency is solved each time that
# one is named, which costs more than a query.
def _write_session(request: Request) -> Iterator[Session]:
    with _services(request).database.write() as session:
        yield session


async def _read_session(request: Request) -> AsyncIterator[Session]:
    """Give a session that connects when it is used; only closing it may need a thread."""
    services = _services(request)
    with ExitStack() as stack:
        session = stack.enter_context(services.database.read())
        try:
            yield session
        finally:
            if session.in_transaction() and not services.database.is_embedded:
                await run_in_threadpool(session.close)


# scope="function": the commit happens before the response is sent, so that a client never holds
# a success for a row that then failed to commit.
WriteSession = Annotated[Session, Depends(_write_session, scope="function")]
ReadSession = Annotated[Session, Depends(_read_session, scope="function")]


async def short_read(
    database: Database, read: Callable[..., _Result], *arguments: object
) -> _Result:
    """Return what one or two indexed reads find, which take no longer than a thread takes to start.

    From a file of this machine they are made at once: handing them to a thread would cost more, and
    the threads would wait for each other. A database behind a network is asked from a thread.
    """
    if database.is_embedded:
        return read(*arguments)
    return await run_in_threadpool(read, *arguments)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling, from the API key."""

    project_id: str
    key_id: str
    scopes: tuple[str, ...]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None

    def using(self, model: str) -> User:
        """Return whom the use of a model is counted for."""
        return User(self.project_id, self.key_id, model)


INTERNAL_CALLER = "tunery.caller"
"""Key of an ASGI scope: who calls, once that is known; no client can set it.

It is set from the start when the service itself asks for somebody.
"""


async def get_caller(request: Request) -> Caller:
    """Return who calls: by a bearer key, or from the page by its cookie.

    Found and counted once in a request, however often it is asked.

    Raises:
        AuthenticationError: neither, or not a valid one.
        PermissionDeniedError: a change by cookie that does not come from the page itself.
        CapacityError: the key has used up the requests of its minute.
    """
    internal = request.scope.get(INTERNAL_CALLER)
    if isinstance(internal, Caller):
        return internal
    services = _services(request)
    secret = _secret(request)
    known = services.callers.get(secret) if secret else None
    if isinstance(known, Caller):
        caller = known
    else:
        caller = await run_in_threadpool(_identify, request, services, secret)
    if caller.requests_per_minute is not None:  # only then the broker is asked
        admit = services.rates.admit
        verdict = await run_in_threadpool(admit, caller.key_id, caller.requests_per_minute)
        obey(request, verdict)
    request.scope[INTERNAL_CALLER] = caller
    return caller


def obey(request: Request, verdict: Verdict) -> None:
    """Have the response tell a key's limits; raises the refusal if there is one."""
    request.state.headers.update(verdict.headers)
    if verdict.refusal is not None:
        raise verdict.refusal


def _secret(request: Request) -> str | None:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else None


def _identify(request: Request, services: Services, secret: str | None) -> Caller:
    with services.database.read() as session:
        if secret:
            key = tenancy.authenticate(session, secret)
            caller = _caller(key, services)
            if key.expires_at is None:  # else its end would come too late
                services.callers.put(secret, caller)
            return caller
        page = page_session.read_cookie(session, request.cookies.get(page_session.COOKIE, ""))
        if page is None:
            raise AuthenticationError(
                "You didn't provide an API key. Send it in the header: 'Authorization: Bearer KEY'."
            )
        page_session.require_own_page(request, page)
        return _caller(page.key, services)


def caller_of(services: Services, key_id: str, scopes: tuple[str, ...]) -> Caller:
    """Return who a key stands for, with other scopes, for what the service does in its name."""
    with services.database.read() as session:
        caller = _caller(session.get_one(ApiKey, key_id), services)
    return replace(caller, scopes=scopes)


def _caller(key: ApiKey, services: Services) -> Caller:
    """Return a caller with the limits of the key, else of its project, else of the service."""
    project, defaults = key.project, services.settings.api
    return Caller(
        project_id=key.project_id,
        key_id=key.id,
        scopes=tuple(key.scopes),
        requests_per_minute=(
            key.requests_per_minute or project.requests_per_minute or defaults.requests_per_minute
        ),
        tokens_per_minute=(
            key.tokens_per_minute or project.tokens_per_minute or defaults.tokens_per_minute
        ),
        tokens_per_day=project.tokens_per_day,
    )


CallerDep = Annotated[Caller, Depends(get_caller)]


async def require_tokens(request: Request) -> None:
    """Refuse a key or a project that has used up its tokens (of the minute, of the day).

    Raises:
        CapacityError, QuotaError: it has.
    """
    services, caller = _services(request), await get_caller(request)
    if caller.tokens_per_minute is None and caller.tokens_per_day is None:
        services.rates.admit_tokens(caller.key_id, None)  # asks nobody
    else:
        await run_in_threadpool(_require_tokens, request, services, caller)


def _require_tokens(request: Request, services: Services, caller: Caller) -> None:
    obey(request, services.rates.admit_tokens(caller.key_id, caller.tokens_per_minute))
    if caller.tokens_per_day is not None:
        with services.database.read() as session:
            unwritten = services.meter.pending(caller.project_id)
            quotas.check_serving(session, caller.project_id, unwritten)


MAX_TEXT = 200
"""Longest text to look for in a list."""
Text = Annotated[str, Query(max_length=MAX_TEXT, description="A text in the name or the id.")]
After = Annotated[str | None, Query(description="Id of the last item of the previous page.")]
