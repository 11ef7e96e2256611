"""What a caller can do across database, store and queue: once, for every kind of route."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import structlog
from sqlalchemy.orm import Session

from api.deps import Caller
from api.services import Services
from models.db import after_commit
from models.domain.base import JsonObject
from models.domain.status import FileStatus
from models.domain.training import TrainingSpec
from models.errors import InvalidRequestError, PayloadTooLargeError
from models.registry import adapters, base_models, files, jobs
from models.storage import CHUNK, ObjectStore, adapter_prefix, upload_key
from models.tables import File, Job, new_id

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as a client sends it; the name is only ever shown, never used as a path."""

    content: BinaryIO
    filename: str
    purpose: str


def accept_upload(services: Services, caller: Caller, upload: Upload) -> File:
    """Stream an upload into the store, then add its row and ring a worker to lint it.

    The bytes go first, outside any transaction: an upload may take minutes.

    Raises:
        InvalidRequestError: the file is empty.
        PayloadTooLargeError: it exceeds the limit; nothing of it is kept.
    """
    limit = services.settings.api.max_upload_bytes
    digest = hashlib.sha256()
    size = 0

    def measured() -> Iterator[bytes]:
        nonlocal size
        while chunk := upload.content.read(CHUNK):
            size += len(chunk)
            if size > limit:
                raise PayloadTooLargeError(
                    f"The file is larger than {limit:,} bytes, the limit of this service.",
                    param="file",
                )
            digest.update(chunk)
            yield chunk
        if size == 0:
            raise InvalidRequestError("The file is empty.", param="file", code="empty_file")

    file_id = new_id("file-")
    services.store.put(upload_key(file_id), measured())
    trainable = upload.purpose == files.TRAINABLE
    with services.database.write() as session:
        file = files.create(
            session,
            File(
                id=file_id,
                project_id=caller.project_id,
                purpose=upload.purpose,
                filename=display_name(upload.filename),
                bytes=size,
                sha256=digest.hexdigest(),
                status=FileStatus.UPLOADED if trainable else FileStatus.PROCESSED,
            ),
        )
        if trainable:
            services.bell.ring_after_commit(session)
    return file


def display_name(filename: str) -> str:
    """Return a file name that is safe to show and to send back: the last path part, no controls."""
    name = re.split(r"[/\\]", filename)[-1]
    name = "".join(char for char in name if unicodedata.category(char)[0] != "C")
    return name.strip()[:200] or "upload"


def delete_file(session: Session, services: Services, caller: Caller, file_id: str) -> None:
    files.delete(session, caller.project_id, file_id)
    key = upload_key(file_id)
    after_commit(session, f"delete {key}", lambda: services.store.delete(key))


def submit_job(
    session: Session,
    services: Services,
    caller: Caller,
    spec: TrainingSpec,
    metadata: dict[str, str] | None,
) -> Job:
    """Add a job for files and a base model that this project may use, and ring a worker.

    Raises:
        InvalidRequestError: unknown base model, or a file that is no training data (names `param`).
        NotFoundError: a file that does not exist.
    """
    base_models.get(session, spec.model)
    for param, file_id in (
        ("training_file", spec.training_file),
        ("validation_file", spec.validation_file),
    ):
        if file_id is None:
            continue
        file = files.get(session, caller.project_id, file_id, param=param)
        if file.purpose != files.TRAINABLE:
            raise InvalidRequestError(
                f"File {file_id} has purpose '{file.purpose}'; it must be uploaded with purpose "
                f"'{files.TRAINABLE}'.",
                param=param,
                code="invalid_file_purpose",
            )
    pairs: JsonObject | None = dict(metadata) if metadata else None
    job = jobs.create(session, caller.project_id, spec, pairs)
    services.bell.ring_after_commit(session)
    return job


def delete_model(session: Session, services: Services, caller: Caller, name: str) -> None:
    """Delete a fine-tuned model; its objects go too unless another name stands for them."""
    orphan = adapters.delete(session, caller.project_id, name)
    if orphan is not None:
        after_commit(
            session,
            f"delete {orphan}",
            lambda: _delete_tree(services.store, adapter_prefix(orphan)),
        )


def _delete_tree(store: ObjectStore, prefix: str) -> None:
    for info in store.list(prefix):
        store.delete(info.key)
