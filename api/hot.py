"""What is asked thousands of times a second, answered before FastAPI.

``GET`` of a job, of the first page of jobs, and ``POST`` of a job go through the routes of
``api.openai.fine_tuning`` like all others, whose dependencies take FastAPI longer than the database
takes, behind layers that have nothing to do for them. This answers them from the same rows with the
same functions where nothing is left to decide: a key that was checked a moment ago, has the scope
and no rate limit, a file as the database, no parameters in the URL, no ``Idempotency-Key``, no job
that waits in the queue, and a body that is whole and valid. Whatever else is asked is the router's,
and so is whatever is refused before anything is written.
"""

from collections.abc import Container
from functools import lru_cache, partial

import orjson
from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import bodies, errors
from api.deps import INTERNAL_CALLER, Caller
from api.idempotency import HEADER as IDEMPOTENCY_KEY
from api.middleware import RequestId
from api.openai import fine_tuning
from api.openai.schemas import JobCreate
from api.services import Services
from api.strict_json import loads
from models.db import Database
from models.domain import access
from models.domain.status import JobStatus
from models.errors import TuneryError
from models.registry import job_reads

JOBS = "/v1/fine_tuning/jobs"
ONE = f"{JOBS}/ftjob-"
PAGE = 20
"""The default ``limit`` of the list."""
KEPT = 4096
"""Objects of jobs whose rows have not changed."""
MAX_BODY = 16 * 1024
"""Larger bodies of jobs are the router's, which counts what comes."""
_NO_POST = (b"authorization", b"transfer-encoding", IDEMPOTENCY_KEY.encode())
_NO_READ = (*_NO_POST, b"content-length")
_OF_BODIES = (b"content-length", b"content-type")


class HotPaths:
    """Answers what it can, and passes the rest on.

    Args:
        app: The application, whose services it uses.
        rest: What answers everything else.
    """

    def __init__(self, app: FastAPI, rest: ASGIApp) -> None:
        self._app = app
        self._rest = rest
        self._rendered = lru_cache(KEPT)(_render)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp | None = None
        if _may_create(scope):
            caller = self._known_caller(scope, access.Scope.TRAIN, _NO_POST)
            if caller is not None:
                first = await receive()
                wanted = None if first.get("more_body") else _job_of(first.get("body", b""))
                if wanted is None:
                    receive = _replay(first, receive)
                else:
                    scope[INTERNAL_CALLER] = caller
                    answer = partial(_create, self._services, caller, wanted)
        elif _may_be_hot(scope):
            body = self._read(scope)
            if body is not None:
                answer = partial(_send, body)
        await (self._rest if answer is None else RequestId(answer))(scope, receive, send)

    @property
    def _services(self) -> Services:
        services = self._app.state.services
        assert isinstance(services, Services)
        return services

    def _known_caller(
        self, scope: Scope, needed: access.Scope, not_hot: Container[bytes]
    ) -> Caller | None:
        """Return who calls, if that is known and nothing has to be counted or read.

        `not_hot` are names of headers that leave something to decide, the key's where it comes
        twice.
        """
        services = self._services
        if not services.database.is_embedded:
            return None
        secret = None
        for name, value in scope["headers"]:
            if name == b"authorization" and secret is None:
                scheme, _, secret = value.decode("latin-1").partition(" ")
                if scheme.lower() != "bearer":
                    return None
            elif name in not_hot:
                return None
        known = services.callers.get(secret.strip()) if secret else None
        if not isinstance(known, Caller) or known.requests_per_minute is not None:
            return None
        return known if access.allows(known.scopes, needed) else None

    def _read(self, scope: Scope) -> bytes | None:
        services = self._services
        caller = self._known_caller(scope, access.Scope.READ, _NO_READ)
        if caller is None:
            return None
        try:
            if scope["path"] == JOBS:
                return self._page(services, caller.project_id)
            return self._job(services, caller.project_id, scope["path"][len(JOBS) + 1 :])
        except DBAPIError:
            return None  # the route says what is wrong, if it still is

    def _job(self, services: Services, project_id: str, job_id: str) -> bytes | None:
        row = job_reads.row(services.database, project_id, job_id)
        if row is None or _waits(row):
            return None
        return self._rendered(row, services.database, services.settings.api.organization)

    def _page(self, services: Services, project_id: str) -> bytes | None:
        rows = job_reads.newest_rows(services.database, project_id, PAGE + 1)
        shown = rows[:PAGE]
        if any(map(_waits, shown)):
            return None
        organization = services.settings.api.organization
        ids = [row[job_reads.ID] for row in shown]
        parts = (
            b'{"object":"list","data":[',
            b",".join([self._rendered(row, services.database, organization) for row in shown]),
            b'],"first_id":',
            orjson.dumps(ids[0] if ids else None),
            b',"last_id":',
            orjson.dumps(ids[-1] if ids else None),
            b',"has_more":true}' if len(rows) > PAGE else b',"has_more":false}',
        )
        return b"".join(parts)


async def _create(
    services: Services,
    caller: Caller,
    wanted: JobCreate,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    try:
        job = await fine_tuning.start_from_base(wanted, services, caller)
    except TuneryError as error:
        response = errors.tunery_error_response(error)
    except DBAPIError as error:
        known = errors.database_error_response(error)
        if known is None:
            raise
        response = known
    else:
        await _send(orjson.dumps(job), scope, receive, send)
        return
    await response(scope, receive, send)


async def _send(body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
    headers = [
        (b"content-length", str(len(body)).encode()),
        (b"content-type", b"application/json"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _replay(first: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives a message again which was taken already."""
    taken = [first]

    async def again() -> Message:
        return taken.pop() if taken else await receive()

    return again


def _may_be_hot(scope: Scope) -> bool:
    if not _is_plain(scope, "GET"):
        return False
    path: str = scope["path"]
    return path == JOBS or (path.startswith(ONE) and "/" not in path[len(ONE) :])


def _may_create(scope: Scope) -> bool:
    """Whether somebody posts a job in one piece of JSON, whose size says that it is small."""
    if not _is_plain(scope, "POST") or scope["path"] != JOBS:
        return False
    told = {name: value for name, value in scope["headers"] if name in _OF_BODIES}
    size = told.get(b"content-length", b"")
    is_small = size.isdigit() and int(size) <= MAX_BODY
    return is_small and told.get(b"content-type") == b"application/json"


def _is_plain(scope: Scope, method: str) -> bool:
    if scope["type"] != "http" or scope["method"] != method or scope["query_string"]:
        return False
    return not scope.get("root_path") and INTERNAL_CALLER not in scope


def _job_of(body: bytes) -> JobCreate | None:
    """Return a valid body of a job on a base model, or None."""
    try:
        wanted = JobCreate.model_validate(loads(body))
    except (ValueError, RecursionError, TuneryError):  # the route says what is wrong with it
        return None
    return None if wanted.model.startswith("ft:") else wanted


def _waits(row: job_reads.JobRow) -> bool:
    """Whether a job has a place in the queue, which changes with other jobs."""
    return bool(row[job_reads.STATUS] == JobStatus.QUEUED)


def _render(row: job_reads.JobRow, database: Database, organization: str) -> bytes:
    """Return the object of a job; it follows from the columns alone, so it may be kept by them."""
    return orjson.dumps(bodies.job_body(job_reads.job_of(database, row), organization))
