"""Pages of jobs: the list, a new one, one of them, several beside each other."""

from typing import Any, get_args

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from api import bodies
from api.deps import ReadSession, ServicesDep
from api.job_differences import default_differences, differ, settings
from api.page_session import PageSession
from api.services import Services
from api.ui import fitting, plugin_forms
from api.ui.frame import PageDep, PageRoute, listing, one_of, render
from models.domain.base import JsonObject
from models.domain.estimates import BaseShape
from models.domain.reports import StepMetrics
from models.domain.status import JobStatus
from models.domain.training import Optimizer, Precision
from models.registry import (
    adapters,
    base_models,
    checkpoints,
    events,
    files,
    jobs,
    metrics,
    turns,
    workers,
)
from models.registry.files import FileChoice
from models.registry.jobs import JobFilter, SortJobs
from models.registry.page import Cursor
from worker.training import methods, objectives

router = APIRouter(route_class=PageRoute)

PAGE_POINTS = 600
MAX_COMPARED = 8
MAX_CHOICES = 100
"""Files and fine-tuned models that a form offers, the newest; others are asked for by link."""
POINT_FIELDS = frozenset(
    {
        *("step", "epoch", "train_loss", "valid_loss", "full_valid_loss"),
        *(
            "learning_rate",
            "grad_norm",
            "train_mean_token_accuracy",
            "tokens_per_second",
            "recorded_at",
        ),
    }
)


@router.get("/jobs")
def jobs_page(
    request: Request, session: ReadSession, services: ServicesDep, page: PageDep
) -> Response:
    return render(request, "jobs.html", page, **_jobs(request, session, services, page))


@router.get("/jobs/table")
def jobs_table(
    request: Request, session: ReadSession, services: ServicesDep, page: PageDep
) -> Response:
    """The table alone, which the page asks for every few seconds."""
    return render(request, "_jobs_table.html", page, **_jobs(request, session, services, page))


def _jobs(
    request: Request, session: Session, services: Services, page: PageSession
) -> dict[str, Any]:
    listed = listing(request, *get_args(SortJobs))
    asked = request.query_params.get("status") or None
    status = JobStatus(asked) if asked in set(JobStatus) else None
    wanted = JobFilter(status, listed.text)
    sort = one_of(listed.sort, get_args(SortJobs))
    found = jobs.list_page(session, page.key.project_id, listed.cursor(), wanted, sort)
    organization = services.settings.api.organization
    places = turns.places(session, found.rows)
    rows = [bodies.job_body(row, organization, places.get(row.id)) for row in found.rows]
    return {
        "jobs": rows,
        "latest": metrics.latest(session, [row["id"] for row in rows]),
        "has_more": found.has_more,
        "listed": listed,
        "status_filter": status,
        "statuses": [str(each) for each in JobStatus],
        "n_workers": len(workers.alive(session)),
    }


@router.get("/jobs/new")
def new_job_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    project = page.key.project_id
    asked = request.query_params
    precision = plugin_forms.of_schema("precision", Precision.model_json_schema())
    trainable = files.newest(session, project, files.TRAINABLE, MAX_CHOICES)
    if asked.get("file") and asked["file"] not in [each.id for each in trainable]:
        file = files.get(session, project, asked["file"])
        trainable.append(FileChoice(file.id, file.filename, file.bytes))
    return render(
        request,
        "new_job.html",
        page,
        files=trainable,
        bases=_bases(session, project, asked.get("model", "")),
        refusals=fitting.refusals(_shapes(session), precision["types"]),
        methods=[plugin_forms.of_plugin(each) for each in methods.all_methods().values()],
        objectives=[plugin_forms.of_plugin(each) for each in objectives.all_objectives().values()],
        precision=precision,
        optimizer=plugin_forms.of_schema("optimizer", Optimizer.model_json_schema()),
        chosen=asked.get("file", ""),
        model=asked.get("model", ""),
        source=asked.get("from", ""),
        n_workers=len(workers.alive(session)),
    )


def _bases(session: Session, project_id: str, asked: str) -> dict[str, str]:
    """Return the names that a job can start from, and the base of each.

    They are the bases, the newest adapters and the one asked for, which may be no adapter at all.
    """
    found = {model.name: model.name for model in base_models.active(session)}
    tuned = adapters.list_page(session, project_id, Cursor(limit=MAX_CHOICES))
    found |= {adapter.name: adapter.base_model for adapter in tuned.rows}
    return found | ({asked: ""} if asked and asked not in found else {})


def _shapes(session: Session) -> dict[str, BaseShape | None]:
    return {
        model.name: None if model.shape is None else BaseShape.model_validate(model.shape)
        for model in base_models.active(session)
    }


@router.get("/jobs/{job_id}")
def job_page(
    job_id: str, request: Request, session: ReadSession, services: ServicesDep, page: PageDep
) -> Response:
    job = jobs.get(session, page.key.project_id, job_id)
    place = turns.places(session, [job]).get(job_id)
    body = bodies.job_body(job, services.settings.api.organization, place)
    points, n_points = metrics.sample(session, job_id, 0, PAGE_POINTS)
    saved = checkpoints.list_page(session, job_id, Cursor(limit=100))
    best = checkpoints.best(saved.rows)
    return render(
        request,
        "job.html",
        page,
        job=body,
        points=[_point(each) for each in points],
        n_points=n_points,
        events=[bodies.event_body(each) for each in events.messages(session, job_id, 100)],
        last_sequence=events.last_sequence(session, job_id),
        checkpoints=[bodies.checkpoint_body(each) for each in saved.rows],
        best_step=best and best.step,
        sample_file=_sample_file(session, page, body) or "",
        changed=default_differences(body),
    )


def _sample_file(session: Session, page: PageSession, job: JsonObject) -> str | None:
    """Return the file whose rows the models are asked, better one that was not trained on."""
    asked = (job["validation_file"], job["training_file"])
    return files.with_rows(session, page.key.project_id, *asked)


def _point(point: StepMetrics) -> JsonObject:
    """Return what the curves need of a step, to seven digits, and times to a tenth of a second."""
    given = point.model_dump(exclude_none=True, include=set(POINT_FIELDS))
    return {
        name: float(f"{value:.7g}") if isinstance(value, float) else value
        for name, value in given.items()
    } | ({"recorded_at": round(point.recorded_at, 1)} if point.recorded_at is not None else {})


@router.get("/compare")
def compare_page(
    request: Request, session: ReadSession, services: ServicesDep, page: PageDep
) -> Response:
    """Up to eight jobs beside each other; the URL is all the state there is."""
    ids = [each for each in request.query_params.get("ids", "").split(",") if each]
    found = [jobs.get(session, page.key.project_id, each) for each in ids[:MAX_COMPARED]]
    rows = [bodies.job_body(job, services.settings.api.organization) for job in found]
    curves, results = [], {}
    for row in rows:
        points, _ = metrics.sample(session, row["id"], 0, PAGE_POINTS)
        judged = [each.full_valid_loss for each in points if each.full_valid_loss is not None]
        results[row["id"]] = {
            "train_loss": points[-1].train_loss if points else None,
            "valid_loss": min(judged, default=None),
        }
        label = row["user_provided_suffix"] or row["id"]
        line = [{"step": each.step, "train_loss": each.train_loss} for each in points]
        curves.append({"label": label, "points": line})
    best = {
        name: min(filter(None, (each[name] for each in results.values())), default=None)
        for name in ("train_loss", "valid_loss")
    }
    return render(
        request,
        "compare.html",
        page,
        jobs=rows,
        curves=curves,
        results=results,
        best=best,
        settings=[(name, values, differ(values)) for name, values in settings(rows)],
        names=_callable_names(session, rows),
        sample_file=(rows and _sample_file(session, page, rows[0])) or "",
    )


def _callable_names(session: Session, rows: list[JsonObject]) -> dict[str, str]:
    """Return what each job is asked by: its result, else its newest checkpoint, if any."""
    names = {}
    for row in rows:
        saved = checkpoints.list_page(session, row["id"], Cursor(limit=1)).rows
        name = row["fine_tuned_model"] or (saved[0].name if saved else None)
        if name:
            names[row["id"]] = name
    return names
