"""``/v1/sweeps``: one job body over a grid of values, as a group of jobs with a table."""

import copy
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field, ValidationError
from sqlalchemy.orm import Session

from api import actions, bodies
from api.deps import After, CallerDep, ReadSession, ServicesDep, WriteSession
from api.openai import translate
from api.openai.schemas import JobCreate
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject, Parameters, Text
from models.errors import InvalidRequestError
from models.explain import explain
from models.registry import jobs, metrics, sweeps
from models.registry.page import Cursor
from models.tables import Job, Sweep, SweepJob, new_id

router = APIRouter(prefix="/sweeps", tags=["sweeps"], route_class=StrictJsonRoute)

MAX_JOBS = 64
_LOSSES = ("full_valid_loss", "valid_loss", "train_loss")
_SHOWN = ("step", *_LOSSES, "full_valid_mean_token_accuracy", "train_mean_token_accuracy")

Values = Annotated[list[Any], Field(min_length=1, max_length=MAX_JOBS)]


class SweepCreate(Parameters):
    """The body of ``POST /sweeps``: `grid` maps fields of a job (``peft.r``) to their values."""

    name: Annotated[Text, Field(min_length=1, max_length=100)] | None = None
    job: JsonObject
    grid: Annotated[dict[Text, Values], Field(min_length=1, max_length=16)]


def _points(grid: dict[str, list[Any]]) -> Iterator[JsonObject]:
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _at(job: JsonObject, point: JsonObject) -> JobCreate:
    """Return the job body at a point. Raises `InvalidRequestError` (param: the job's field)."""
    body = copy.deepcopy(job)
    for path, value in point.items():
        place: Any = body
        *parents, last = path.split(".")
        for name in parents:
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
            if not isinstance(place, dict):
                raise InvalidRequestError(
                    f"'{path}' is no field of a job: {name} is no object.", param=f"grid.{path}"
                )
        place[last] = value
    try:
        return JobCreate.model_validate(body)
    except ValidationError as error:
        raise explain(error.errors()) from None


@router.post("")
def create_sweep(
    body: SweepCreate, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Submit one job for each point of a grid: all of them, or none if one is refused."""
    n_jobs = prod(len(values) for values in body.grid.values())
    if n_jobs > MAX_JOBS:
        raise InvalidRequestError(
            f"The grid has {n_jobs:,} points; the most are {MAX_JOBS}.", param="grid"
        )
    sweep = Sweep(
        id=new_id("sweep_"),
        project_id=caller.project_id,
        name=body.name,
        job=body.job,
        grid=body.grid,
    )
    sweeps.create(session, sweep)
    for position, point in enumerate(_points(body.grid)):
        wanted = _at(body.job, point)
        start = actions.find_start(session, caller, wanted.model)
        spec = translate.training_spec(wanted, start)
        job = actions.submit_job(session, services, caller, spec, wanted.metadata)
        sweeps.add_job(session, sweep, position, job, point)
    return _sweep_body(session, sweep)


@router.get("")
def list_sweeps(
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JsonObject:
    page = sweeps.list_page(session, caller.project_id, Cursor(after, limit))
    return bodies.list_body(page, lambda sweep: _sweep_body(session, sweep))


@router.get("/{sweep_id}")
def retrieve_sweep(sweep_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    """A sweep with its table: of each job the values, the status and the newest metrics."""
    return _sweep_body(session, sweeps.get(session, caller.project_id, sweep_id))


@router.post("/{sweep_id}/cancel")
def cancel_sweep(sweep_id: str, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Cancel every job of a sweep that has not ended."""
    sweep = sweeps.get(session, caller.project_id, sweep_id)
    for _, job in sweeps.jobs_of(session, [sweep.id])[sweep.id]:
        if not jobs.has_ended(job) and not job.cancel_requested:
            jobs.cancel(session, caller.project_id, job.id)
    return _sweep_body(session, sweep)


def _sweep_body(session: Session, sweep: Sweep) -> JsonObject:
    members = sweeps.jobs_of(session, [sweep.id])[sweep.id]
    newest = metrics.latest(session, [job.id for _, job in members])
    rows = []
    for member, job in members:
        values = newest[job.id].model_dump(exclude_none=True) if job.id in newest else {}
        rows.append(_row(member, job, values))
    judged = [row for row in rows if row["status"] == "succeeded" and row["loss"] is not None]
    best = min(judged, key=lambda row: float(row["loss"]), default=None)
    return {
        "id": sweep.id,
        "object": "sweep",
        "name": sweep.name,
        "created_at": int(sweep.created_at),
        "job": sweep.job,
        "grid": sweep.grid,
        "status": "ended" if all(jobs.has_ended(job) for _, job in members) else "running",
        "best_job_id": best and best["job_id"],
        "jobs": rows,
    }


def _row(member: SweepJob, job: Job, values: JsonObject) -> JsonObject:
    """Return a row of the table; `loss` is the best that is known: validation before training."""
    return {
        "job_id": job.id,
        "point": member.point,
        "status": job.status,
        "fine_tuned_model": job.fine_tuned_model,
        "error": job.error_code,
        "loss": next((values[name] for name in _LOSSES if name in values), None),
        "metrics": {name: values[name] for name in _SHOWN if name in values},
    }
