"""``/v1/uploads``: a file in parts, which may come in parallel, in any order, and over restarts."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, File, UploadFile
from pydantic import Field, StrictInt
from starlette.concurrency import run_in_threadpool

from api import actions, bodies
from api.deps import Caller, CallerDep, ReadSession, ServicesDep, WriteSession
from api.openai.schemas import PURPOSES
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.db import after_commit
from models.domain.base import JsonObject, Parameters, Text
from models.domain.status import UploadStatus
from models.errors import InvalidRequestError, PayloadTooLargeError
from models.registry import files, quotas, uploads
from models.storage import CHUNK, part_key
from models.tables import Upload, UploadPart, new_id

router = APIRouter(prefix="/uploads", tags=["uploads"], route_class=StrictJsonRoute)


class UploadCreate(Parameters):
    """The body of ``POST /uploads``."""

    bytes: Annotated[StrictInt, Field(ge=1)]
    filename: Text
    mime_type: Text
    purpose: Text
    expires_after: None = None


class UploadComplete(Parameters):
    """The body of ``POST /uploads/{id}/complete``: the parts in the order of the file."""

    part_ids: Annotated[list[Text], Field(min_length=1, max_length=10_000)]
    md5: Text | None = None


@router.post("")
def create_upload(
    body: UploadCreate, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Announce a file of `bytes` bytes; its parts are taken for an hour."""
    if body.purpose not in PURPOSES:
        raise InvalidRequestError(
            f"'{body.purpose[:100]}' is not one of {list(PURPOSES)}. Training data is 'fine-tune'.",
            param="purpose",
        )
    limit = services.settings.api.max_upload_bytes
    if body.bytes > limit:
        raise PayloadTooLargeError(
            f"The file is larger than {limit:,} bytes, the limit of this service.", param="bytes"
        )
    quotas.check_bytes(session, caller.project_id, body.bytes)
    upload = Upload(
        project_id=caller.project_id,
        purpose=body.purpose,
        filename=actions.display_name(body.filename),
        mime_type=body.mime_type[:255],
        bytes=body.bytes,
    )
    return bodies.upload_body(uploads.create(session, upload))


@router.get("/{upload_id}")
def retrieve_upload(upload_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    """Return an upload and the parts that have come, so that a client can go on with it."""
    upload = uploads.get(session, caller.project_id, upload_id)
    parts = [bodies.part_body(part) for part in uploads.parts(session, upload.id)]
    return bodies.upload_body(upload) | {"parts": parts}


@router.post("/{upload_id}/parts")
async def create_part(
    upload_id: str,
    services: ServicesDep,
    caller: CallerDep,
    data: Annotated[UploadFile, File()],
) -> JsonObject:
    """Take one part; its place in the file is told when the upload is completed."""
    return await run_in_threadpool(_take_part, services, caller, upload_id, data)


def _take_part(services: Services, caller: Caller, upload_id: str, data: UploadFile) -> JsonObject:
    limit = services.settings.api.max_part_bytes
    with services.database.write() as session:
        uploads.get_pending(session, caller.project_id, upload_id)
    part_id = new_id("part_")
    key = part_key(upload_id, part_id)
    n_bytes = 0

    def measured() -> Iterator[bytes]:
        nonlocal n_bytes
        while chunk := data.file.read(CHUNK):
            n_bytes += len(chunk)
            if n_bytes > limit:
                raise PayloadTooLargeError(
                    f"The part is larger than {limit:,} bytes; send the file in smaller ones.",
                    param="data",
                )
            yield chunk
        if n_bytes == 0:
            raise InvalidRequestError("The part is empty.", param="data", code="empty_file")

    services.store.put(key, measured())
    with actions.adding(services, key) as session:
        upload = uploads.get_pending(session, caller.project_id, upload_id)
        return bodies.part_body(uploads.add_part(session, upload, part_id, n_bytes))


@router.post("/{upload_id}/complete")
async def complete_upload(
    upload_id: str, body: UploadComplete, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Make one file of the parts. Asked again with the same parts, it gives the same file."""
    return await run_in_threadpool(_complete, services, caller, upload_id, body)


def _complete(
    services: Services, caller: Caller, upload_id: str, body: UploadComplete
) -> JsonObject:
    with services.database.read() as session:
        upload = uploads.get(session, caller.project_id, upload_id)
        if upload.status == UploadStatus.COMPLETED and upload.file_id is not None:
            file = files.get(session, caller.project_id, upload.file_id)
            return bodies.upload_body(upload) | {"file": bodies.file_body(file)}
        uploads.require_pending(session, upload)
        chosen = _chosen(uploads.parts(session, upload_id), body.part_ids)
    n_bytes = sum(part.bytes for part in chosen)
    if n_bytes != upload.bytes:
        raise InvalidRequestError(
            f"The parts have {n_bytes:,} bytes; {upload.bytes:,} were announced.",
            param="part_ids",
            code="upload_size_mismatch",
        )
    md5 = hashlib.md5(usedforsecurity=False)

    def content() -> Iterator[bytes]:
        for part in chosen:
            for chunk in services.store.stream(part_key(upload_id, part.id)):
                md5.update(chunk)
                yield chunk

    sent = actions.Upload(content(), upload.filename, upload.purpose)
    stored = actions.store_content(services, sent.content, services.settings.api.max_upload_bytes)
    with actions.adding(services, stored.key) as session:
        if body.md5 is not None and md5.hexdigest() != body.md5.lower():
            raise InvalidRequestError(
                f"The content has the MD5 {md5.hexdigest()}, not the one that was sent.",
                param="md5",
                code="checksum_mismatch",
            )
        upload = uploads.get_pending(session, caller.project_id, upload_id)
        for key in uploads.finish(session, upload, UploadStatus.COMPLETED, stored.file_id):
            after_commit(session, f"delete {key}", partial(services.store.delete, key))
        file = actions.add_file(session, services, caller, sent, stored)
        return bodies.upload_body(upload) | {"file": bodies.file_body(file)}


def _chosen(parts: Sequence[UploadPart], part_ids: list[str]) -> list[UploadPart]:
    known = {part.id: part for part in parts}
    for at, part_id in enumerate(part_ids):
        if part_id not in known:
            raise InvalidRequestError(
                f"{part_id[:100]!r} is no part of this upload.",
                param=f"part_ids[{at}]",
                code="part_not_found",
            )
        if part_id in part_ids[:at]:
            raise InvalidRequestError(
                f"{part_id!r} is named twice.", param=f"part_ids[{at}]", code="part_repeated"
            )
    return [known[part_id] for part_id in part_ids]


@router.post("/{upload_id}/cancel")
def cancel_upload(
    upload_id: str, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Give an upload up; its parts are deleted."""
    upload = uploads.get_pending(session, caller.project_id, upload_id)
    for key in uploads.finish(session, upload, UploadStatus.CANCELLED, None):
        after_commit(session, f"delete {key}", partial(services.store.delete, key))
    return bodies.upload_body(upload)
