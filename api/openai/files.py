"""``/v1/files``."""

from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Form, Query, UploadFile
from fastapi.responses import StreamingResponse

from api import actions
from api.deps import After, CallerDep, ReadSession, ServicesDep, WriteSession
from api.openai import translate
from api.openai.schemas import PURPOSES
from models.domain.base import JsonObject
from models.errors import InvalidRequestError, NotFoundError
from models.registry import files
from models.registry.page import Cursor
from models.storage import ObjectNotFoundError, upload_key

router = APIRouter(prefix="/files", tags=["files"])


@router.post("")
def create_file(
    services: ServicesDep,
    caller: CallerDep,
    file: UploadFile,
    purpose: Annotated[str, Form()],
    expires_seconds: Annotated[str | None, Form(alias="expires_after[seconds]")] = None,
) -> JsonObject:
    """Upload a file; a training file is linted line by line before any job starts on it."""
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
    upload = actions.Upload(file.file, file.filename or "upload", purpose)
    return translate.file_body(actions.accept_upload(services, caller, upload))


@router.get("")
def list_files(
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> JsonObject:
    page = files.list_page(session, caller.project_id, Cursor(after, limit, order), purpose=purpose)
    return translate.list_body(page, translate.file_body)


@router.get("/{file_id}")
def retrieve_file(file_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    file = files.get(session, caller.project_id, file_id)
    return translate.file_body(file) | {"report": file.report}


@router.get("/{file_id}/content")
def retrieve_content(
    file_id: str, session: ReadSession, services: ServicesDep, caller: CallerDep
) -> StreamingResponse:
    file = files.get(session, caller.project_id, file_id)
    try:
        chunks = services.store.stream(upload_key(file.id))
    except ObjectNotFoundError:
        raise NotFoundError(
            f"The content of file {file_id!r} is gone from the object store.",
            param="file_id",
            code="file_not_found",
        ) from None
    return StreamingResponse(
        chunks,
        media_type="application/octet-stream",
        headers={
            "content-length": str(file.bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        },
    )


@router.delete("/{file_id}")
def delete_file(
    file_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    actions.delete_file(session, services, caller, file_id)
    return {"id": file_id, "object": "file", "deleted": True}
