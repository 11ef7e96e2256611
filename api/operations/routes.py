"""``/v1/workers`` and ``/v1/usage``; only the operator's key drains a worker."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from api.access import is_operator
from api.audit import note
from api.deps import Caller, CallerDep, ReadSession, ServicesDep, WriteSession
from api.operation_bodies import usage_buckets, worker_body, workers_body
from models.domain.base import JsonObject
from models.errors import InvalidRequestError, PermissionDeniedError
from models.registry import usage, workers
from models.registry.usage import DAY_SECONDS

DEFAULT_DAYS = 30
MAX_DAYS = 366
MAX_TIME = 2**40

router = APIRouter(tags=["operations"])
operator_router = APIRouter(prefix="/workers", tags=["operations"])

Time = Annotated[int | None, Query(ge=0, le=MAX_TIME)]


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
    start_time: Time = None,
    end_time: Time = None,
    group_by: Annotated[list[Literal["model", "api_key_id"]] | None, Query()] = None,
) -> JsonObject:
    """Show what the project used on each day (UTC): requests, tokens served and trained, seconds
    of devices. Times are seconds since 1970; the default is the last 30 days. ``group_by`` may be
    repeated.
    """
    services.meter.flush()
    last = usage.today(session) if end_time is None else max(0, end_time - 1) // DAY_SECONDS
    first = last - DEFAULT_DAYS + 1 if start_time is None else start_time // DAY_SECONDS
    if first > last:
        raise InvalidRequestError("'end_time' must be after 'start_time'.", param="end_time")
    if last - first >= MAX_DAYS:
        raise InvalidRequestError(
            f"The range has more than {MAX_DAYS} days; ask for less.", param="start_time"
        )
    rows = usage.by_day(session, caller.project_id, first, last)
    buckets = usage_buckets(rows, group_by or ())
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
    if not is_operator(session, caller.project_id):
        raise PermissionDeniedError("Only an admin key of the default project drains workers.")
    note(session, caller, "worker.drained" if draining else "worker.resumed", worker_id)
    status = "draining" if draining else "online"
    return worker_body(worker, workers.busy_slots(session), caller.project_id, status)
