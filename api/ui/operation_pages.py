"""Pages for who runs the service: workers, usage, keys, and a person's own settings."""

import csv
import io
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from api import bodies
from api.deps import ReadSession, ServicesDep
from api.operation_bodies import usage_buckets, workers_body
from api.page_session import PageSession
from api.ui import texts
from api.ui.frame import THEMES, PageDep, PageRoute, render
from models.domain.access import Scope, allows
from models.errors import PermissionDeniedError
from models.registry import tenancy, usage
from models.registry.usage import DAY_SECONDS

router = APIRouter(route_class=PageRoute)

RANGES = (7, 30, 90)
GROUPS = ("day", "model", "key")
KEY_DAYS = (7, 30, 90, 365)
COUNTERS = (
    "num_model_requests",
    "input_tokens",
    "output_tokens",
    "trained_tokens",
    "device_seconds",
)


@router.get("/workers")
def workers_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    return render(request, "workers.html", page, **_workers(session, page))


@router.get("/workers/table")
def workers_table(request: Request, session: ReadSession, page: PageDep) -> Response:
    """The cards alone, which the page asks for every few seconds."""
    return render(request, "_workers.html", page, **_workers(session, page))


def _workers(session: Session, page: PageSession) -> dict[str, Any]:
    project = page.key.project_id
    return {
        "workers": workers_body(session, project),
        "may_drain": tenancy.is_operator(tenancy.get_project(session, project), page.key.scopes),
    }


@router.get("/usage")
def usage_page(
    request: Request, session: ReadSession, services: ServicesDep, page: PageDep
) -> Response:
    """What the project used, by day, model or key; ``?format=csv`` is the same as a file."""
    services.meter.flush()
    asked = request.query_params
    n_days = next((each for each in RANGES if str(each) == asked.get("days")), RANGES[1])
    group = next((each for each in GROUPS if each == asked.get("by")), GROUPS[0])
    last = usage.today(session)
    found = usage.by_day(session, [page.key.project_id], last - n_days + 1, last)
    buckets = usage_buckets(found, {"model": ["model"], "key": ["api_key_id"]}.get(group, []))
    keys = {key.id: key.name for key in tenancy.list_keys(session, page.key.project_id)}
    rows = _usage_rows(buckets, group, keys)
    if asked.get("format") == "csv":
        return _csv(rows, group)
    sums = {name: sum(row[name] for row in rows) for name in COUNTERS}
    return render(
        request,
        "usage.html",
        page,
        rows=rows,
        sums=sums,
        days=[_day(buckets, day) for day in range(last - n_days + 1, last + 1)],
        group=group,
        groups=GROUPS,
        n_days=n_days,
        ranges=RANGES,
    )


def _usage_rows(
    buckets: list[dict[str, Any]], group: str, keys: dict[str, str]
) -> list[dict[str, Any]]:
    """Return one row for each day, model or key, with its sums."""
    rows: dict[str, dict[str, Any]] = {}
    for bucket in buckets:
        day = time.strftime("%Y-%m-%d", time.gmtime(bucket["start_time"]))
        for result in bucket["results"]:
            name = {
                "day": day,
                "model": result["model"] or "",
                "key": keys.get(result["api_key_id"], result["api_key_id"] or ""),
            }[group]
            row = rows.setdefault(name, {"name": name} | dict.fromkeys(COUNTERS, 0))
            for counter in COUNTERS:
                row[counter] += result[counter]
    return list(rows.values())


def _day(buckets: list[dict[str, Any]], day: int) -> dict[str, Any]:
    """Return the tokens of a day for the chart: trained, and served."""
    results = [
        result
        for bucket in buckets
        if bucket["start_time"] == day * DAY_SECONDS
        for result in bucket["results"]
    ]
    return {
        "day": day,
        "trained": sum(each["trained_tokens"] for each in results),
        "served": sum(each["input_tokens"] + each["output_tokens"] for each in results),
    }


def _csv(rows: list[dict[str, Any]], group: str) -> Response:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([group, *COUNTERS])
    for row in rows:
        writer.writerow([_plain(row["name"]), *(row[name] for name in COUNTERS)])
    return Response(
        out.getvalue(),
        media_type="text/csv",
        headers={"content-disposition": f'attachment; filename="usage-by-{group}.csv"'},
    )


def _plain(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


@router.get("/keys")
def keys_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    if not allows(page.key.scopes, Scope.ADMIN):
        raise PermissionDeniedError("Only an admin key shows and changes keys.")
    found = tenancy.list_keys(session, page.key.project_id)
    rows = [bodies.key_body(key) for key in found]
    # The page is of one project.
    scopes = [str(each) for each in Scope if each is not Scope.ORGANIZATION]
    return render(
        request,
        "keys.html",
        page,
        keys=rows,
        own=page.key.id,
        scopes=scopes,
        lifetimes=KEY_DAYS,
    )


@router.get("/settings")
def settings_page(request: Request, page: PageDep) -> Response:
    """A person's own settings, which cookies keep, and what this service and key are."""
    return render(
        request,
        "settings.html",
        page,
        themes=THEMES,
        languages=texts.languages(),
        chosen_language=request.cookies.get("tunery_language", ""),
        key=bodies.key_body(page.key),
    )
