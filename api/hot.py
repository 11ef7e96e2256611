"""The two questions that are asked thousands of times a second, answered before the router.

``GET`` of a job and of the first page of jobs go through the routes of ``api.openai.fine_tuning``
like all others, whose dependencies take FastAPI longer than the database takes. This answers them
from the same rows with the same functions where nothing is left to decide: a key that was checked a
moment ago, has the scope and no rate limit, a file as the database, no parameters, and no job that
waits in the queue. Whatever else is asked, and whatever is refused, is the router's.
"""

from functools import lru_cache

import orjson
from sqlalchemy.exc import DBAPIError
from starlette.types import ASGIApp, Receive, Scope, Send

from api import bodies
from api.deps import INTERNAL_CALLER, Caller
from api.services import Services
from models.db import Database
from models.domain import access
from models.domain.status import JobStatus
from models.registry import job_reads

JOBS = "/v1/fine_tuning/jobs"
ONE = f"{JOBS}/ftjob-"
PAGE = 20
"""The default ``limit`` of the list."""
KEPT = 4096
"""Objects of jobs whose rows have not changed."""
_NOT_HOT = (b"authorization", b"content-length", b"transfer-encoding")


class HotReads:
    """Answers what it can, and passes the rest on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._rendered = lru_cache(KEPT)(_render)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = self._answer(scope) if _may_be_hot(scope) else None
        if body is None:
            await self.app(scope, receive, send)
            return
        headers = [
            (b"content-length", str(len(body)).encode()),
            (b"content-type", b"application/json"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _answer(self, scope: Scope) -> bytes | None:
        services = scope["app"].state.services
        assert isinstance(services, Services)
        caller = _known_caller(scope, services) if services.database.is_embedded else None
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


def _may_be_hot(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET" or scope["query_string"]:
        return False
    path: str = scope["path"]
    if scope.get("root_path") or INTERNAL_CALLER in scope:
        return False
    return path == JOBS or (path.startswith(ONE) and "/" not in path[len(ONE) :])


def _known_caller(scope: Scope, services: Services) -> Caller | None:
    """Return who calls, if that is known already and nothing has to be counted or read."""
    secret = None
    for name, value in scope["headers"]:
        if name == b"authorization" and secret is None:
            scheme, _, secret = value.decode("latin-1").partition(" ")
            if scheme.lower() != "bearer":
                return None
        elif name in _NOT_HOT:
            return None
    known = services.callers.get(secret.strip()) if secret else None
    if not isinstance(known, Caller) or known.requests_per_minute is not None:
        return None
    return known if access.allows(known.scopes, access.Scope.READ) else None


def _waits(row: job_reads.JobRow) -> bool:
    """Whether a job has a place in the queue, which changes with other jobs."""
    return bool(row[job_reads.STATUS] == JobStatus.QUEUED)


def _render(row: job_reads.JobRow, database: Database, organization: str) -> bytes:
    """Return the object of a job; it follows from the columns alone, so it may be kept by them."""
    return orjson.dumps(bodies.job_body(job_reads.job_of(database, row), organization))
