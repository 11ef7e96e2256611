"""Pages of data sets and models, and the playground."""

from typing import get_args

from fastapi import APIRouter, Request
from fastapi.responses import Response

from api import bodies
from api.deps import ReadSession
from api.model_card import model_card
from api.ui.frame import PageDep, PageRoute, listing, one_of, render
from models.domain.base import JsonObject
from models.registry import adapters, base_models, files
from models.registry.files import SortFiles
from models.registry.page import Cursor
from models.tables import Adapter

router = APIRouter(route_class=PageRoute)

ADAPTERS_OF_A_BASE = 20
"""So many of each base are on the page of all models, the newest."""
MAX_CHOICES = 100


@router.get("/datasets")
def datasets_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    listed = listing(request, *get_args(SortFiles))
    found = files.list_page(
        session,
        page.key.project_id,
        listed.cursor(),
        purpose=files.TRAINABLE,
        text=listed.text,
        sort=one_of(listed.sort, get_args(SortFiles)),
    )
    rows = [bodies.file_body(file) | {"report": file.report} for file in found.rows]
    return render(
        request, "datasets.html", page, files=rows, listed=listed, has_more=found.has_more
    )


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
    """Bases with their newest adapters; ``?base=`` shows all of one base, page by page."""
    project = page.key.project_id
    listed = listing(request, "created_at")
    chosen = request.query_params.get("base", "")
    counts = adapters.count_by_base(session, project)
    bases = []
    for model in base_models.active(session):
        if chosen not in ("", model.name):
            continue
        cursor = listed.cursor() if chosen else Cursor(limit=ADAPTERS_OF_A_BASE)
        found = adapters.list_page(
            session, project, cursor, base_model=model.name, text=listed.text
        )
        bases.append(
            bodies.base_model_body(model)
            | {
                "n_parameters": model.n_parameters,
                "adapters": [_in_list(each) for each in found.rows],
                "n_adapters": counts.get(model.name, 0),
                "has_more": found.has_more,
            }
        )
    return render(request, "models.html", page, bases=bases, listed=listed, chosen=chosen)


def _in_list(adapter: Adapter) -> JsonObject:
    return bodies.adapter_body(adapter) | {
        "bytes": adapter.bytes,
        "method": adapter.manifest["method"],
    }


@router.get("/models/{name:path}")
def model_page(name: str, request: Request, session: ReadSession, page: PageDep) -> Response:
    card = model_card(session, page.key.project_id, name)
    return render(
        request, "model.html", page, model=card, service=str(request.base_url).rstrip("/")
    )


@router.get("/playground")
def playground_page(request: Request, session: ReadSession, page: PageDep) -> Response:
    names = [model.name for model in base_models.active(session)]
    newest = adapters.list_page(session, page.key.project_id, Cursor(limit=MAX_CHOICES))
    tuned = [adapter.name for adapter in newest.rows]
    asked = request.query_params
    return render(
        request,
        "playground.html",
        page,
        models=names + tuned,
        left=asked.get("left") or (names[0] if names else ""),
        right=asked.get("right") or (tuned[0] if tuned else ""),
    )
