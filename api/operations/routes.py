"""``/v1/workers`` and ``/v1/usage``; only the operator's key drains a worker."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from sqlalchemy.orm import Session

from api.audit import note
from api.deps import Caller, CallerDep, ReadSession, ServicesDep, WriteSession
from api.operation_bodies import usage_buckets, worker_body, workers_body
from models.domain.base import JsonObject
from models.errors import InvalidRequestError, PermissionDeniedError
from models.registry import tenancy, usage, workers
from models.registry.usage import DAY_SECONDS

DEFAULT_DAYS = 30
MAX_DAYS = 366
MAX_TIME = 2**40

router = APIRouter(tags=["operations"])
operator_router = APIRouter(prefix="/workers", tags=["operations"])

Time = Annotated[int | None, Query(ge=0, le=MAX_TIME)]
Groups = list[Literal["project_id", "model", "api_key_id"]]


@dataclass(frozen=True, slots=True)
class AskedUsage:
    """From when to when, in seconds since 1970, and what to tell apart.

    `as_sdk_writes` is `group_by` too, whose name the ``openai`` SDK writes with brackets.
    """

    group_by: Annotated[Groups, Query(default_factory=list)]
    as_sdk_writes: Annotated[
        Groups, Query(alias="group_by[]", default_factory=list, include_in_schema=False)
    ]
    start_time: Time = None
    end_time: Time = None


@router.get("/workers")
def list_workers(session: ReadSession, caller: CallerDep) -> JsonObject:
    """List the workers that live (devices, memory in bytes, what each slot does; ``status``
    "draining" takes no new job), those lost within a day ("offline"), then the inference servers.
    Jobs of other projects are not named.
    """
    data = workers_body(session, caller.project_id)
    return {"object": "list", "data": data, "has_more": False}


@router.get("/usage")
def show_usage(
    session: ReadSession,
    services: ServicesDep,
    caller: CallerDep,
    asked: Annotated[AskedUsage, Depends()],
    all_projects: bool = False,
) -> JsonObject:
    """Show what the project used on each day (UTC): requests, tokens served and trained, seconds
    of devices. Times are seconds since 1970; the default is the last 30 days. ``group_by`` may be
    repeated. ``all_projects`` counts all that the key can see: those of its organisation, for a key
    with that scope.
    """
    services.meter.flush()
    start_time, end_time = asked.start_time, asked.end_time
    last = usage.today(session) if end_time is None else max(0, end_time - 1) // DAY_SECONDS
    first = last - DEFAULT_DAYS + 1 if start_time is None else start_time // DAY_SECONDS
    if first > last:
        raise InvalidRequestError("'end_time' must be after 'start_time'.", param="end_time")
    if last - first >= MAX_DAYS:
        raise InvalidRequestError(
            f"The range has more than {MAX_DAYS} days; ask for less.", param="start_time"
        )
    project_ids = [caller.project_id]
    if all_projects:
        reach = tenancy.within_reach(session, caller.project_id, caller.scopes)
        project_ids = [project.id for project in reach]
    rows = usage.by_day(session, project_ids, first, last)
    buckets = usage_buckets(rows, [*asked.group_by, *asked.as_sdk_writes])
    return {"object": "page", "data": buckets, "has_more": False, "next_page": None}


@operator_router.post("/{worker_id}/drain")
def drain_worker(worker_id: str, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Have a worker take no new job; what it trains goes on to its end, and others take the rest.

    It lasts until the worker is resumed or started anew. Only a key of the default project can do
    this.
    """
    return _set_draining(session, caller, worker_id, True)


@operator_router.post("/{worker_id}/resume")
def resume_worker(worker_id: str, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Have a draining worker take jobs again. Only a key of the default project can do this."""
    return _set_draining(session, caller, worker_id, False)


def _set_draining(session: Session, caller: Caller, worker_id: str, draining: bool) -> JsonObject:
    worker = workers.set_draining(session, worker_id, draining)
    own = tenancy.get_project(session, caller.project_id)
    if not tenancy.is_operator(own, caller.scopes):
        raise PermissionDeniedError("Only an admin key of the default project drains workers.")
    note(session, caller, "worker.drained" if draining else "worker.resumed", worker_id)
    status = "draining" if draining else "online"
    return worker_body(worker, workers.busy_slots(session), caller.project_id, status)
