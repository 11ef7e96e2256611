"""``/v1/fine_tuning/jobs``."""

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from api import actions, bodies
from api.audit import change, note
from api.deps import (
    MAX_TEXT,
    After,
    Caller,
    CallerDep,
    ReadSession,
    ServicesDep,
    WriteSession,
    short_read,
)
from api.openai import translate
from api.openai.filters import metadata_filter
from api.openai.schemas import JobCreate
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.db import Database
from models.domain.base import JsonObject
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import checkpoints, events, job_reads, jobs, turns
from models.registry.jobs import JobFilter, SortJobs
from models.registry.page import Cursor, Page
from models.tables import Job, ordered_id

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"], route_class=StrictJsonRoute)


@router.post("")
async def create_job(body: JobCreate, services: ServicesDep, caller: CallerDep) -> JsonObject:
    """Submit a job; it starts as soon as its files are linted and a device is free.

    ``model`` is a base model, or a fine-tuned model or checkpoint to go on from.
    """

    if not body.model.startswith("ft:"):
        return await start_from_base(body, services, caller)

    def create(session: Session) -> Job:
        start = actions.find_start(session, caller, body.model)
        spec = translate.training_spec(body, start)
        job = actions.submit_job(session, services, caller, spec, body.metadata)
        note(session, caller, "fine_tuning.job.created", job.id, model=body.model)
        return job

    job = await services.writer.run(create)
    return bodies.job_body(job, services.settings.api.organization)


async def start_from_base(body: JobCreate, services: Services, caller: Caller) -> JsonObject:
    """Submit a job whose `model` is a base model: nothing has to be read before."""
    spec = translate.training_spec(body, actions.Start(body.model))
    job_id = ordered_id("ftjob-")
    what = ("fine_tuning.job.created", job_id)
    noted = change(caller, caller.project_id, what, model=body.model)
    wanted = actions.Submission(services, caller, spec, body.metadata, job_id, noted)
    job = await services.writer.join(actions.submit_jobs, wanted)
    return bodies.job_body(job, services.settings.api.organization)


def _placed(session: Session, services: Services, job: Job) -> JsonObject:
    place = turns.places(session, [job]).get(job.id)
    return bodies.job_body(job, services.settings.api.organization, place)


async def _places(database: Database, found: Sequence[Job]) -> dict[str, turns.Place]:
    if all(job.status != JobStatus.QUEUED for job in found):
        return {}  # as most are, which takes no session

    def ask() -> dict[str, turns.Place]:
        with database.read() as session:
            return turns.places(session, found)

    return await run_in_threadpool(ask)


async def _cursor(
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Cursor:
    return Cursor(after, limit, order)


async def _filter(
    request: Request,
    status: JobStatus | None = None,
    q: Annotated[str, Query(max_length=MAX_TEXT)] = "",
) -> JobFilter:
    metadata, without_metadata = metadata_filter(request)
    return JobFilter(status, q, metadata, without_metadata)


@router.get("")
async def list_jobs(
    services: ServicesDep,
    caller: CallerDep,
    wanted: Annotated[JobFilter, Depends(_filter)],
    cursor: Annotated[Cursor, Depends(_cursor)],
    sort: SortJobs = "created_at",
) -> JsonObject:
    """List jobs, newest first, optionally by ``metadata[key]=value`` or ``metadata=null``.

    ``q`` is a text in the id, the suffix, or the name of the base or of the result.
    """
    organization = services.settings.api.organization
    database, project_id = services.database, caller.project_id

    def read() -> Page[Job]:
        with database.read() as session:
            return jobs.list_page(session, project_id, cursor, wanted, sort)

    if (wanted, sort, cursor) == (JobFilter(), "created_at", Cursor(limit=cursor.limit)):
        page = await short_read(database, job_reads.newest, database, project_id, cursor.limit)
    else:  # it may look at every job
        page = await run_in_threadpool(read)
    places = await _places(database, page.rows)
    return bodies.list_body(
        page, lambda job: bodies.job_body(job, organization, places.get(job.id))
    )


@router.get("/{job_id}")
async def retrieve_job(job_id: str, services: ServicesDep, caller: CallerDep) -> JsonObject:
    database = services.database
    job = await short_read(database, job_reads.get, database, caller.project_id, job_id)
    place = (await _places(database, [job])).get(job_id)
    return bodies.job_body(job, services.settings.api.organization, place)


@router.post("/{job_id}/cancel")
def cancel_job(
    job_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Cancel a waiting job at once, a running one at its next step."""
    job = jobs.cancel(session, caller.project_id, job_id)
    note(session, caller, "fine_tuning.job.cancelled", job.id)
    return bodies.job_body(job, services.settings.api.organization)


@router.post("/{job_id}/pause")
def pause_job(
    job_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Pause a waiting job at once; a running one saves a checkpoint at its next step and stops."""
    job = jobs.pause(session, caller.project_id, job_id)
    note(session, caller, "fine_tuning.job.paused", job.id)
    return bodies.job_body(job, services.settings.api.organization)


@router.post("/{job_id}/resume")
def resume_job(
    job_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Put a paused job back into the queue; it goes on exactly where it stopped."""
    job = jobs.resume(session, caller.project_id, job_id)
    note(session, caller, "fine_tuning.job.resumed", job.id)
    services.bell.ring_after_commit(session)
    return _placed(session, services, job)


@router.post("/{job_id}/rerun")
def rerun_job(
    job_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Submit a job once more: same files, same seed, and the numbers that "auto" had become.

    On the same kind of machine it makes the same adapter, on a CPU bit for bit; within rounding
    where it shares its passes with other queued jobs.
    """
    job = jobs.get(session, caller.project_id, job_id)
    spec = TrainingSpec.model_validate(job.spec)
    again = actions.submit_job(session, services, caller, spec, job.request_metadata)
    events.append(session, again.id, f"Rerun of job {job_id}")
    note(session, caller, "fine_tuning.job.created", again.id, rerun_of=job_id)
    return bodies.job_body(again, services.settings.api.organization)


@router.get("/{job_id}/events")
def list_events(
    job_id: str,
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> JsonObject:
    """List what happened to a job, newest first."""
    jobs.get(session, caller.project_id, job_id)
    page = events.list_page(session, job_id, Cursor(after, limit))
    return bodies.list_body(page, bodies.event_body)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str,
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> JsonObject:
    """List the checkpoints of a job, newest first; each can be called by its name."""
    jobs.get(session, caller.project_id, job_id)
    page = checkpoints.list_page(session, job_id, Cursor(after, limit))
    return bodies.list_body(page, bodies.checkpoint_body)
