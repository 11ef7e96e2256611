"""How a job goes: its metrics, and everything that happens to it as server-sent events."""

from collections.abc import Coroutine
from typing import Annotated, Any, cast

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Send

from api.deps import Caller, CallerDep, ReadSession, ServicesDep
from api.feed import JobFeed, News, Position
from api.services import Services
from models.domain.base import JsonObject
from models.errors import InvalidRequestError
from models.registry import job_logs, jobs, metrics

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"])

MAX_POINTS = 10_000
LOG_BYTES = 64 * 1024
MAX_LOG_BYTES = 1024 * 1024
MAX_OFFSET = 2**53


@router.get("/{job_id}/metrics")
def list_metrics(
    job_id: str,
    session: ReadSession,
    caller: CallerDep,
    after: Annotated[int, Query(ge=0, le=MAX_OFFSET, description="Only steps after this.")] = 0,
    until: Annotated[int | None, Query(ge=0, le=MAX_OFFSET, description="None after this.")] = None,
    max_points: Annotated[int, Query(ge=2, le=MAX_POINTS)] = 1000,
) -> JsonObject:
    """The metrics of a job's steps in order; of a long run, evenly spaced ones and the last.

    Steps with a validation loss are never left out.
    """
    jobs.get(session, caller.project_id, job_id)
    points, n_all = metrics.sample(session, job_id, after, max_points, until)
    return {
        "object": "list",
        "data": [point.model_dump(exclude_none=True) for point in points],
        "n_points": n_all,
        "has_more": False,
    }


@router.get("/{job_id}/log")
def read_log(
    job_id: str,
    session: ReadSession,
    caller: CallerDep,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_OFFSET, description="Offset in bytes; absent: the end.")
    ] = None,
    limit: Annotated[int, Query(ge=256, le=MAX_LOG_BYTES, description="Most bytes.")] = LOG_BYTES,
) -> JsonObject:
    """What the trainers of a job wrote to their log, as whole lines; of a long log only the newest
    part is kept.

    To follow it, ask again with ``after`` = ``next_offset``, until ``has_ended`` and not
    ``has_more``.
    """
    job = jobs.get(session, caller.project_id, job_id)
    has_ended = job_logs.is_complete(session, job)  # asked first: then nothing of it is missing
    found = job_logs.read(session, job_id, after, limit)
    return {
        "object": "fine_tuning.job.log",
        "job_id": job_id,
        "text": found.text,
        "offset": found.start,
        "next_offset": found.next,
        "first_offset": found.first,
        "has_more": found.next < found.end,
        "has_ended": has_ended,
    }


@router.get("/{job_id}/stream")
async def stream_job(
    job_id: str,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    after: Annotated[str, Query(description="Position: the id of the last event seen.")] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """Everything that happens to a job, from a position on: no gap, nothing twice.

    Events: ``job`` (the job object), ``metrics`` (a list of steps), ``event``, ``checkpoint``,
    and ``end`` when the job has ended.
    """
    await run_in_threadpool(_require, services, caller, job_id)
    try:
        position = Position.parse(last_event_id or after or "0")
    except (TypeError, ValueError):
        raise InvalidRequestError(
            "'after' must be the id of an event of this stream.", param="after"
        ) from None
    return _JobStream(services.feed, job_id, position, request.state.send)


def _require(services: Services, caller: Caller, job_id: str) -> None:
    with services.database.read() as session:
        jobs.get(session, caller.project_id, job_id)


class _JobStream(StreamingResponse):
    """The news of a job as server-sent events; how a client goes away is noticed as usual.

    Args:
        feed: Where the news come from.
        job_id: The job.
        position: What the client has seen.
        send: The server's own: around the route only the start of an answer is looked at, and each
            layer that passes news on takes a microsecond for each reader.
    """

    def __init__(self, feed: JobFeed, job_id: str, position: Position, send: Send) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__((), media_type="text/event-stream", headers=headers)
        self._feed = feed
        self._job_id = job_id
        self._position = position
        self._send = send

    async def stream_response(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        send_news = self._send

        def tell(news: News) -> Coroutine[Any, Any, None]:
            # ASGI says "awaitable"; all servers and layers that there are give coroutines.
            return cast("Coroutine[Any, Any, None]", send_news(news.message))

        hello = b": a stream of what happens\n\nretry: 2000\n\n"
        await send({"type": "http.response.body", "body": hello, "more_body": True})
        await self._feed.follow(self._job_id, self._position, tell)
        # One that is too slow ends too: the browser comes back with the last id that it has seen.
        await send({"type": "http.response.body", "body": b"", "more_body": False})
