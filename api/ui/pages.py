"""The pages under ``/ui``. They render what ``/v1`` answers; every change is a call of ``/v1``."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from fastapi.templating import Jinja2Templates

from api import bodies, page_session
from api.deps import ReadSession, ServicesDep
from api.job_differences import settings_that_differ
from api.model_card import model_card
from api.page_session import PageSession
from api.ui import filters, texts, vendor
from api.ui.assets import Assets
from models.domain.access import Scope, allows
from models.domain.status import JobStatus
from models.errors import AuthenticationError, NotFoundError, PermissionDeniedError, TuneryError
from models.registry import (
    adapters,
    base_models,
    checkpoints,
    events,
    files,
    jobs,
    metrics,
    tenancy,
)
from models.registry.page import Cursor
from worker.training import methods, objectives


class PageRoute(APIRoute):
    """A route whose errors are pages as well."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except TuneryError as error:
                return render(request, "error.html", status=error.status_code, error=error)

        return handle


router = APIRouter(prefix="/ui", include_in_schema=False, route_class=PageRoute)

HERE = Path(__file__).parent
PAGE_JOBS = 50
PAGE_POINTS = 600
MAX_COMPARED = 8
assets = Assets(HERE / "static")
templates = Jinja2Templates(HERE / "templates")
templates.env.trim_blocks = templates.env.lstrip_blocks = True
templates.env.filters |= filters.ALL
templates.env.globals["missing_files"] = vendor.missing


class LoginNeeded(Exception):
    """A page was asked for without a session; the application leads to the login."""


def page_of(request: Request, session: ReadSession) -> PageSession:
    found = page_session.read_cookie(session, request.cookies.get(page_session.COOKIE, ""))
    if found is None:
        raise LoginNeeded
    return found


PageDep = Annotated[PageSession, Depends(page_of)]


def render(
    request: Request, name: str, page: PageSession | None = None, status: int = 200, **values: Any
) -> Response:
    """Render a template with what every page has."""
    root = request.scope.get("root_path", "")
    language = texts.choose(request.headers.get("accept-language", ""))
    everywhere = {
        "root": root,
        "asset": lambda path: f"{root}/ui/static/{assets.url(path)}",
        "csrf": page.csrf if page else "",
        "key_name": page.key.name if page else "",
        "language": language,
        "t": texts.translator(language),
        "theme": request.cookies.get("tunery_theme", "system"),
        "here": request.url.path.removeprefix(root),
    }
    return templates.TemplateResponse(request, name, everywhere | values, status_code=status)


@router.get("/login")
def login_page(request: Request, next: str = "/ui/jobs") -> Response:
    return render(request, "login.html", next=next)


@router.post("/session")
def log_in(
    request: Request,
    session: ReadSession,
    key: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "/ui/jobs",
) -> Response:
    """Exchange a key for the page's cookie, and go where the person wanted to."""
    try:
        found = tenancy.authenticate(session, key.strip())
        if not allows(found.scopes, Scope.READ):
            raise AuthenticationError("The page needs a key that can read.")
    except AuthenticationError:
        return render(request, "login.html", status=401, next=next, failed=True)
    root = request.scope.get("root_path", "")
    # A path of our own and nothing else, so that a link cannot send people elsewhere.
    target = next if next.startswith("/ui/") else "/ui/jobs"
    response = RedirectResponse(root + target, status_code=303)
    response.set_cookie(
        page_session.COOKIE,
        page_session.make_cookie(found),
        max_age=page_session.SECONDS,
        path=f"{root}/",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
def log_out(request: Request) -> Response:
    root = request.scope.get("root_path", "")
    response = RedirectResponse(f"{root}/ui/login", status_code=303)
    response.delete_cookie(page_session.COOKIE, path=f"{root}/")
    return response


@router.get("")
@router.get("/")
def home(request: Request) -> Response:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/ui/jobs", status_code=303)


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


def _jobs(request: Request, session: Any, services: Any, page: PageSession) -> dict[str, Any]:
    wanted = request.query_params.get("status") or None
    cursor = Cursor(request.query_params.get("after") or None, PAGE_JOBS)
    status = JobStatus(wanted) if wanted in set(JobStatus) else None
    found = jobs.list_page(session, page.key.project_id, cursor, status=status)
    organization = services.settings.api.organization
    rows = [bodies.job_body(row, organization) for row in found.rows]
    latest = metrics.latest(session, [row["id"] for row in rows])
    return {
        "jobs": rows,
        "latest": latest,
        "has_more": found.has_more,
        "status_filter": wanted,
        "statuses": [str(each) for each in JobStatus],
        "ahead": {row["id"]: at for at, row in enumerate(_queued(rows))},
    }


def _queued(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    waiting = [row for row in rows if row["status"] == JobStatus.QUEUED]
    return sorted(waiting, key=lambda row: (-row["priority"], row["created_at"]))


@router.get("/jobs/new")
def new_job_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    trainable = files.list_page(
        session, page.key.project_id, Cursor(limit=200), purpose=files.TRAINABLE
    )
    return render(
        request,
        "new_job.html",
        page,
        files=[bodies.file_body(file) for file in trainable.rows],
        models=[model.name for model in base_models.active(session)]
        + [adapter.name for adapter in adapters.live(session, page.key.project_id)],
        methods=[_schema(each) for each in methods.all_methods().values()],
        objectives=[_schema(each) for each in objectives.all_objectives().values()],
        chosen=request.query_params.get("file", ""),
        model=request.query_params.get("model", ""),
        source=request.query_params.get("from", ""),
    )


def _schema(plugin: Any) -> dict[str, Any]:
    """Return what a form needs of a plug-in's parameters: name, default, range, help."""
    schema = plugin.Params.model_json_schema()
    fields = [
        {"name": name, **field}
        for name, field in schema.get("properties", {}).items()
        if name != "type"
    ]
    return {"name": plugin.name, "fields": fields}


@router.get("/jobs/{job_id}")
def job_page(
    job_id: str, request: Request, session: ReadSession, services: ServicesDep, page: PageDep
) -> Response:
    job = jobs.get(session, page.key.project_id, job_id)
    points, n_points = metrics.sample(session, job_id, 0, PAGE_POINTS)
    told = events.list_page(session, job_id, Cursor(limit=100))
    saved = checkpoints.list_page(session, job_id, Cursor(limit=100))
    best = checkpoints.best(saved.rows)
    return render(
        request,
        "job.html",
        page,
        job=bodies.job_body(job, services.settings.api.organization),
        points=[point.model_dump(exclude_none=True) for point in points],
        n_points=n_points,
        events=[bodies.event_body(each) for each in told.rows if each.data is None],
        last_sequence=max((each.sequence for each in told.rows), default=0),
        checkpoints=[bodies.checkpoint_body(each) for each in saved.rows],
        best_step=best and best.step,
    )


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
        differences=settings_that_differ(rows),
    )


@router.get("/datasets")
def datasets_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    found = files.list_page(
        session, page.key.project_id, Cursor(limit=200), purpose=files.TRAINABLE
    )
    rows = [bodies.file_body(file) | {"report": file.report} for file in found.rows]
    return render(request, "datasets.html", page, files=rows)


@router.get("/datasets/{file_id}")
def dataset_page(file_id: str, request: Request, session: ReadSession, page: PageDep) -> Response:
    file = files.get(session, page.key.project_id, file_id)
    return render(
        request,
        "dataset.html",
        page,
        file=bodies.file_body(file),
        report=file.report,
        models=[model.name for model in base_models.active(session)],
    )


@router.get("/models")
def models_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    tuned = adapters.live(session, page.key.project_id)
    bases = [
        bodies.base_model_body(model)
        | {
            "n_parameters": model.n_parameters,
            "adapters": [
                bodies.adapter_body(each) | {"bytes": each.bytes, "manifest": each.manifest}
                for each in tuned
                if each.base_model == model.name
            ],
        }
        for model in base_models.active(session)
    ]
    return render(request, "models.html", page, bases=bases)


@router.get("/models/{name:path}")
def model_page(name: str, request: Request, session: ReadSession, page: PageDep) -> Response:
    card = model_card(session, page.key.project_id, name)
    return render(
        request, "model.html", page, model=card, service=str(request.base_url).rstrip("/")
    )


@router.get("/keys")
def keys_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    if not allows(page.key.scopes, Scope.ADMIN):
        raise PermissionDeniedError("Only an admin key shows and changes keys.")
    found = tenancy.list_keys(session, page.key.project_id)
    rows = [bodies.key_body(key) for key in found]
    return render(request, "keys.html", page, keys=rows, own=page.key.id)


@router.get("/playground")
def playground_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    names = [model.name for model in base_models.active(session)]
    tuned = [adapter.name for adapter in adapters.live(session, page.key.project_id)]
    asked = request.query_params
    return render(
        request,
        "playground.html",
        page,
        models=names + tuned,
        left=asked.get("left") or (names[0] if names else ""),
        right=asked.get("right") or (tuned[0] if tuned else ""),
    )


@router.get("/{path:path}")
def no_such_page(path: str, page: PageDep) -> Response:
    raise NotFoundError(f"There is no page /ui/{path[:200]}.", code="unknown_url")
