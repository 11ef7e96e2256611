"""``/v1/files``."""

from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Depends, Form, Query, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from api import actions, bodies
from api.deps import After, Caller, CallerDep, ReadSession, ServicesDep, Text, WriteSession
from api.openai.schemas import PURPOSES
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject
from models.domain.generation import PreviewRequest
from models.domain.reports import DataOptions, DatasetReport
from models.errors import InvalidRequestError, NotFoundError
from models.explain import explain
from models.registry import base_models, files, inference_servers
from models.registry.files import SortFiles
from models.registry.page import Cursor
from models.storage import CHUNK, ObjectNotFoundError
from models.tables import File

router = APIRouter(prefix="/files", tags=["files"], route_class=StrictJsonRoute)

MAX_OFFSET = 2**31 - 1


def _data_options(
    shape: Annotated[str, Form()] = "", columns: Annotated[str, Form()] = ""
) -> DataOptions | None:
    """Read how rows are to be read. Raises `InvalidRequestError` (param names the field)."""
    if not shape and not columns:
        return None
    try:
        mapping = orjson.loads(columns) if columns else {}
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(
            f'\'columns\' is no JSON object ({error}); write e.g. {{"messages": "conversations"}}.',
            param="columns",
        ) from None
    try:
        return DataOptions.model_validate({"shape": shape, "columns": mapping})
    except ValidationError as error:
        raise explain(error.errors()) from None


@router.post("")
def create_file(
    services: ServicesDep,
    caller: CallerDep,
    file: UploadFile,
    purpose: Annotated[str, Form()],
    options: Annotated[DataOptions | None, Depends(_data_options)],
    expires_seconds: Annotated[str | None, Form(alias="expires_after[seconds]")] = None,
) -> JsonObject:
    """Upload a file; a training file is linted line by line before any job starts on it.

    The fields `shape` and `columns` (a JSON object) say how its rows are to be read; else that is
    detected.
    """
    if purpose not in PURPOSES:
        raise InvalidRequestError(
            f"'{purpose[:100]}' is not one of {list(PURPOSES)}. Training data is 'fine-tune'.",
            param="purpose",
        )
    if expires_seconds is not None:
        raise InvalidRequestError(
            "Files do not expire by themselves here; leave 'expires_after' out.",
            param="expires_after",
            code="unsupported_parameter",
        )
    chunks = iter(lambda: file.file.read(CHUNK), b"")
    upload = actions.Upload(chunks, file.filename or "upload", purpose, options)
    return bodies.file_body(actions.accept_upload(services, caller, upload))


@router.get("")
def list_files(  # noqa: PLR0913 (one argument for each parameter of the query)
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
    q: Text = "",
    sort: SortFiles = "created_at",
) -> JsonObject:
    page = files.list_page(
        session,
        caller.project_id,
        Cursor(after, limit, order),
        purpose=purpose,
        text=q,
        sort=sort,
    )
    return bodies.list_body(page, bodies.file_body)


@router.get("/{file_id}")
def retrieve_file(file_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    file = files.get(session, caller.project_id, file_id)
    return bodies.file_body(file) | {"report": file.report}


@router.get("/{file_id}/content")
def retrieve_content(
    file_id: str, session: ReadSession, services: ServicesDep, caller: CallerDep
) -> StreamingResponse:
    file = files.get(session, caller.project_id, file_id)
    response = _download(services, file, file.object_key, file.filename)
    response.headers["content-length"] = str(file.bytes)
    return response


@router.get("/{file_id}/report")
def retrieve_findings(
    file_id: str, session: ReadSession, services: ServicesDep, caller: CallerDep
) -> StreamingResponse:
    """All findings of the lint as JSON lines; the file's own `report` has the first 50."""
    file = _linted(session, caller, file_id)
    return _download(services, file, file.findings_key, f"{file.filename}.findings.jsonl")


@router.get("/{file_id}/cleaned")
def retrieve_cleaned(
    file_id: str, session: ReadSession, services: ServicesDep, caller: CallerDep
) -> StreamingResponse:
    """The usable rows as they were given, as JSON lines; the file itself if all rows are."""
    file = _linted(session, caller, file_id)
    report = DatasetReport.model_validate(file.report)
    if not report.n_valid_rows:
        raise InvalidRequestError(
            f"File {file_id} has no usable row.", param="file_id", code="no_usable_row"
        )
    if file.cleaned_key is None:
        return _download(services, file, file.object_key, file.filename)
    return _download(services, file, file.cleaned_key, f"{file.filename}.cleaned.jsonl")


@dataclass(frozen=True, slots=True)
class _RowsAsked:
    """Which rows of a preview, and the longest a row may be."""

    rows: Annotated[int, Query(ge=0, le=100)] = 5
    offset: Annotated[int, Query(ge=0, le=MAX_OFFSET, description="Rows to skip.")] = 0
    max_length: Annotated[int, Query(ge=1, le=131072)] = 2048


@router.get("/{file_id}/preview")
async def preview_rows(
    file_id: str,
    services: ServicesDep,
    caller: CallerDep,
    model: str,
    asked: Annotated[_RowsAsked, Depends()],
) -> JsonObject:
    """Rows as a base model sees them: text, tokens, what is trained; and statistics.

    The base model's own inference server renders them, with the code that trains.
    """
    rows_key, url = await run_in_threadpool(_preview_source, services, caller, file_id, model)
    request = PreviewRequest(
        rows_key=rows_key, n_rows=asked.rows, offset=asked.offset, max_length=asked.max_length
    )
    shown = await services.inference.preview(url, request)
    return {"object": "file.preview", "file_id": file_id, "model": model} | shown


def _preview_source(
    services: Services, caller: Caller, file_id: str, model: str
) -> tuple[str, str]:
    """Return where the usable rows are, and the server that can show them."""
    with services.database.read() as session:
        file = _linted(session, caller, file_id)
        if file.rows_key is None:
            raise InvalidRequestError(
                f"File {file_id} has no usable row.", param="file_id", code="no_usable_row"
            )
        base_models.get(session, model)
        return file.rows_key, inference_servers.for_base(session, model).url


@router.post("/{file_id}/lint")
def lint_anew(
    file_id: str, body: DataOptions, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Read a data set again, with another shape or other columns."""
    file, freed = files.read_anew(session, caller.project_id, file_id, body)
    actions.discard(session, services, freed)
    services.bell.ring_after_commit(session)
    return bodies.file_body(file)


def _linted(session: ReadSession, caller: CallerDep, file_id: str) -> File:
    file = files.get(session, caller.project_id, file_id)
    if file.report is None:
        raise InvalidRequestError(
            f"File {file_id} has not been checked yet; ask again in a moment."
            if file.purpose == files.TRAINABLE
            else f"File {file_id} is no data set.",
            param="file_id",
            code="file_not_linted",
        )
    return file


def _download(services: ServicesDep, file: File, key: str | None, name: str) -> StreamingResponse:
    """Stream an object; a missing key is an empty one, as an empty object is not stored."""
    try:
        chunks = services.store.stream(key) if key is not None else iter(())
    except ObjectNotFoundError:
        raise NotFoundError(
            f"The content of file {file.id!r} is gone from the object store.",
            param="file_id",
            code="file_not_found",
        ) from None
    return StreamingResponse(
        chunks,
        media_type="application/octet-stream",
        headers={"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"},
    )


@router.delete("/{file_id}")
def delete_file(
    file_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    actions.delete_file(session, services, caller, file_id)
    return {"id": file_id, "object": "file", "deleted": True}
