"""``/v1/adapters``: fine-tuned models with how they were made and where they come from."""

import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, File, Form, Query, UploadFile
from pydantic import StrictBool
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from api import actions, bodies
from api.adapters import imports
from api.adapters.archive import pack
from api.adapters.imports import Import
from api.audit import note
from api.deps import After, Caller, CallerDep, ReadSession, ServicesDep, Text, WriteSession
from api.model_card import model_card
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject, Parameters
from models.errors import InvalidRequestError
from models.registry import adapters, merges
from models.registry.page import Cursor

SUFFIX = r"^[A-Za-z0-9_-]{0,64}$"

router = APIRouter(prefix="/adapters", tags=["models"], route_class=StrictJsonRoute)


class Serving(Parameters):
    """The body of ``POST …/serve``."""

    merged: StrictBool


@router.get("")
def list_adapters(
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    base_model: str | None = None,
    q: Text = "",
) -> JsonObject:
    """List the published adapters of the project, newest first; ``q`` is a part of the name."""
    page = adapters.list_page(
        session, caller.project_id, Cursor(after, limit), base_model=base_model, text=q
    )
    return bodies.list_body(page, bodies.made_body)


@router.post("")
async def import_adapter(
    services: ServicesDep,
    caller: CallerDep,
    file: Annotated[UploadFile, File(description="Zip archive of PEFT's two files.")],
    model: Annotated[str, Form(min_length=1, max_length=200, description="Its base model.")],
    suffix: Annotated[str, Form(pattern=SUFFIX, description="Part of its new name.")] = "",
) -> JsonObject:
    """Take in an adapter that was trained elsewhere.

    An inference server loads it strictly: unless every tensor fits the base model and is used, it
    is refused with the reason.
    """
    given = Import(file.file, model, suffix)
    return bodies.made_body(await imports.import_adapter(services, caller, given))


@router.get("/{model:path}/download")
async def download_adapter(
    model: str, services: ServicesDep, caller: CallerDep
) -> StreamingResponse:
    """Download an adapter or a checkpoint as a zip archive of what PEFT reads."""
    content = await run_in_threadpool(_packed, services, caller, model)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", model)
    return StreamingResponse(
        content,
        media_type="application/zip",
        headers={"content-disposition": f'attachment; filename="{name}.zip"'},
    )


def _packed(services: Services, caller: Caller, model: str) -> Iterator[bytes]:
    with services.database.read() as session:
        found = adapters.resolve_own(session, caller.project_id, model)
    if found.adapter is None:
        raise InvalidRequestError(
            f"{model!r} is a base model; only adapters can be downloaded.",
            param="model",
            code="model_not_fine_tuned",
        )
    return pack(services.store, found.adapter.digest)


@router.post("/{model:path}/merge")
def merge_adapter(
    model: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Have a worker add an adapter to its base: whole weights in 16 bits, as a zip archive.

    When ``status`` is "succeeded", the archive is the file ``file_id``. Asked again, the answer is
    the same merge, unless it has failed or its file was deleted.
    """
    merge = actions.merge_adapter(session, services, caller, model)
    return bodies.merge_body(merge)


@router.get("/{model:path}/merge")
def retrieve_merge(model: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    """Show how the merging of an adapter stands."""
    adapters.resolve_own(session, caller.project_id, model)
    return bodies.merge_body(merges.get(session, caller.project_id, model))


@router.post("/{model:path}/serve")
def serve_adapter(
    model: str, body: Serving, session: WriteSession, caller: CallerDep
) -> JsonObject:
    """Have an adapter answered ``merged``, by a copy of its base with the adapter in the weights.

    Then no request has the adapter's latency; the inference server holds a few such copies and
    makes one at the first request. With ``false`` it is answered in one batch with
    all others again. Name and answers stay the same. Methods that cannot be merged are refused.
    """
    return bodies.made_body(actions.serve_adapter(session, caller, model, merged=body.merged))


@router.post("/{model:path}/archive")
def archive_adapter(model: str, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Take an adapter out of use and keep it: it cannot be called, and is in no list of models."""
    adapter = adapters.set_archived(session, caller.project_id, model, archived=True)
    note(session, caller, "model.archived", model)
    return bodies.made_body(adapter)


@router.post("/{model:path}/restore")
def restore_adapter(model: str, session: WriteSession, caller: CallerDep) -> JsonObject:
    """Put an archived adapter back into use."""
    adapter = adapters.set_archived(session, caller.project_id, model, archived=False)
    note(session, caller, "model.restored", model)
    return bodies.made_body(adapter)


@router.get("/{model:path}")
def retrieve_adapter(model: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    """Show an adapter or a checkpoint with the jobs and data that led to it, its own job first.

    ``successors`` are the jobs that went on from it.
    """
    return model_card(session, caller.project_id, model)
