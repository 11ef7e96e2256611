"""What a caller can do across database, store and queue: once, for every kind of route."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import orjson
import structlog
from sqlalchemy.orm import Session

from api import bodies, merging
from api.audit import note
from api.deps import Caller
from api.services import Services
from models.db import Outcome, after_commit
from models.domain.base import JsonObject
from models.domain.estimates import BaseShape
from models.domain.generation import AdapterRef
from models.domain.reports import DataOptions
from models.domain.status import FileStatus
from models.domain.training import TrainingSpec
from models.errors import InvalidRequestError, PayloadTooLargeError, TuneryError
from models.prepared import reading_once
from models.registry import adapters, audit, base_models, files, jobs, merges, quotas
from models.registry.audit import Change
from models.registry.files import Freed
from models.registry.jobs import NewJob
from models.storage import adapter_prefix, delete_tree, upload_key
from models.tables import Adapter, BaseModel, File, Job, Merge, new_id, ordered_id
from worker.training import methods, objectives

log = structlog.get_logger(__name__)

MAX_NAME_BYTES = 255
MERGED_BYTES = 2
"""Of a parameter of a merged model."""
_DEVICES = {"CON", "PRN", "AUX", "NUL"} | {
    f"{port}{n}" for port in ("COM", "LPT") for n in range(10)
}


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as a client sends it; the name is only ever shown, never used as a path."""

    content: Iterable[bytes]
    filename: str
    purpose: str
    options: DataOptions | None = None


def accept_upload(services: Services, caller: Caller, upload: Upload) -> File:
    """Stream an upload into the store, then add its row and ring a worker to lint it.

    The bytes go first, outside any transaction: an upload may take minutes. Content that the
    project has already is kept once.

    Raises:
        InvalidRequestError: the file is empty.
        PayloadTooLargeError: it exceeds the limit, or what the project may store; nothing of it is
            kept.
    """
    with services.database.read() as session:
        room = quotas.room_for_bytes(session, caller.project_id)
    stored = store_content(services, upload.content, services.settings.api.max_upload_bytes, room)
    with adding(services, stored.key) as session:
        return add_file(session, services, caller, upload, stored)


@contextmanager
def adding(services: Services, *keys: str) -> Iterator[Session]:
    """A transaction about objects that are stored already; a rollback takes them along."""
    is_committed = False

    def note() -> None:
        nonlocal is_committed
        is_committed = True

    try:
        with services.database.write() as session:
            after_commit(session, f"note {keys}", note)
            yield session
    except BaseException:
        for key in () if is_committed else keys:
            services.store.delete(key)
        raise


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes in the store that no row knows yet."""

    file_id: str
    key: str
    bytes: int
    sha256: str


def store_content(
    services: Services, content: Iterable[bytes], limit: int | None, room: int | None = None
) -> Stored:
    """Stream bytes, at most `limit` and `room`, into the store under the key of a new file.

    Raises:
        InvalidRequestError: there are none.
        PayloadTooLargeError: they exceed the limit; nothing of them is kept.
    """
    digest = hashlib.sha256()
    size = 0

    def measured() -> Iterator[bytes]:
        nonlocal size
        for chunk in content:
            size += len(chunk)
            if limit is not None and size > limit:
                raise PayloadTooLargeError(
                    f"The file is larger than {limit:,} bytes, the limit of this service.",
                    param="file",
                )
            if room is not None and size > room:
                raise quotas.bytes_exceeded(room)
            digest.update(chunk)
            yield chunk
        if size == 0:
            raise InvalidRequestError("The file is empty.", param="file", code="empty_file")

    file_id = new_id("file-")
    key = upload_key(file_id)
    services.store.put(key, measured())
    return Stored(file_id, key, size, digest.hexdigest())


def add_file(
    session: Session, services: Services, caller: Caller, upload: Upload, stored: Stored
) -> File:
    """Add the row of stored bytes; of content that the project has already, one object is kept."""
    quotas.check_bytes(session, caller.project_id, stored.bytes)
    trainable = upload.purpose == files.TRAINABLE
    same = files.find_same(session, caller.project_id, stored.sha256, stored.bytes)
    if same is not None:
        after_commit(session, f"delete {stored.key}", lambda: services.store.delete(stored.key))
    file = files.create(
        session,
        File(
            id=stored.file_id,
            project_id=caller.project_id,
            purpose=upload.purpose,
            filename=display_name(upload.filename),
            bytes=stored.bytes,
            sha256=stored.sha256,
            object_key=stored.key if same is None else same.object_key,
            options=upload.options.model_dump(mode="json") if upload.options else None,
            status=FileStatus.UPLOADED if trainable else FileStatus.PROCESSED,
        ),
    )
    note(session, caller, "file.created", file.id, filename=file.filename, bytes=file.bytes)
    if trainable:
        services.bell.ring_after_commit(session)
    return file


def display_name(filename: str) -> str:
    """Return a file name that is safe to show, to send back and to save.

    It is the last part of a path without control characters (those that turn the direction of text
    included), at most 255 bytes, and none of the names that mean a folder or a device.
    """
    name = re.split(r"[/\\]", filename)[-1]
    name = "".join(char for char in name if unicodedata.category(char)[0] != "C").strip()
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    if not name.strip(". ") or name.split(".")[0].upper() in _DEVICES:
        return "upload"
    return name


def delete_file(session: Session, services: Services, caller: Caller, file_id: str) -> None:
    discard(session, services, files.delete(session, caller.project_id, file_id))
    note(session, caller, "file.deleted", file_id)


def discard(session: Session, services: Services, freed: Freed) -> None:
    """Delete what no row refers to any more, once the transaction is committed."""
    for key in freed.keys:
        after_commit(session, f"delete {key}", partial(services.store.delete, key))
    for prefix in freed.prefixes:
        after_commit(session, f"delete {prefix}", partial(delete_tree, services.store, prefix))


@dataclass(frozen=True, slots=True)
class Start:
    """What training starts from: a base model, or an adapter on it and how that was trained."""

    base_model: str
    adapter: AdapterRef | None = None
    spec: TrainingSpec | None = None


def find_start(session: Session, caller: Caller, model: str) -> Start:
    """Return what a job's ``model`` stands for; an adapter's or checkpoint's name goes on from it.

    Raises:
        NotFoundError: this project has no such fine-tuned model.
        InvalidRequestError: it came from outside.
    """
    if not model.startswith("ft:"):
        return Start(model)
    resolved = adapters.resolve_own(session, caller.project_id, model)
    if resolved.job_id is None:
        raise InvalidRequestError(
            f"{model!r} came from outside: nobody knows how it was trained, so a job cannot go on "
            "from it. Start from its base model.",
            param="model",
            code="model_not_trainable",
        )
    job = session.get_one(Job, resolved.job_id)
    return Start(resolved.base_model, resolved.adapter, TrainingSpec.model_validate(job.spec))


def submit_job(
    session: Session,
    services: Services,
    caller: Caller,
    spec: TrainingSpec,
    metadata: JsonObject | None,
) -> Job:
    """Add a job for files and a base model that this project may use, and ring a worker.

    Raises:
        InvalidRequestError, NotFoundError: as `check_job`.
        QuotaError: the project's limits do not allow it.
    """
    wanted = Submission(services, caller, spec, metadata)
    (job,) = jobs.add(session, [_admit(session, wanted)])
    services.bell.ring_after_commit(session)
    return job


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that somebody asks for; it gets this id if it is admitted."""

    services: Services
    caller: Caller
    spec: TrainingSpec
    metadata: JsonObject | None
    job_id: str = field(default_factory=lambda: ordered_id("ftjob-"))
    change: Change | None = None


def submit_jobs(session: Session, wanted: Sequence[Submission]) -> list[Outcome[Job]]:
    """Add several jobs as `submit_job` does each, with their entries of the audit log.

    What many of them ask, such as the base model, is read once, and their rows are written
    together. Of a job that is refused, nothing is.
    """
    outcomes: dict[str, Outcome[Job]] = {}
    admitted: list[tuple[Submission, NewJob]] = []

    def write() -> None:
        made = jobs.add(session, [new for _, new in admitted]) if admitted else []
        audit.record(session, *(each.change for each, _ in admitted if each.change is not None))
        outcomes.update((job.id, Outcome(job)) for job in made)
        admitted.clear()

    with reading_once(session):
        for each in wanted:
            if admitted and quotas.bind_jobs(session, each.caller.project_id):
                write()  # those before it count
            try:
                admitted.append((each, _admit(session, each)))
            except TuneryError as error:
                outcomes[each.job_id] = Outcome(error=error)
            else:
                each.services.bell.ring_after_commit(session)
        write()
    return [outcomes[each.job_id] for each in wanted]


def _admit(session: Session, wanted: Submission) -> NewJob:
    caller, spec = wanted.caller, wanted.spec
    training_file = check_job(session, wanted.services, caller, spec)
    held = quotas.reserve(session, caller.project_id, spec, training_file.bytes)
    metadata = wanted.metadata or None
    return NewJob(caller.project_id, spec, metadata, caller.key_id, held, wanted.job_id)


def check_job(session: Session, services: Services, caller: Caller, spec: TrainingSpec) -> File:
    """Make sure that a job's base model, files and devices are there; return its training file.

    Raises:
        InvalidRequestError: unknown base model, a file that is no training data, or more devices
            than a worker gives to a job (names `param`).
        NotFoundError: a file that does not exist.
    """
    base = base_models.get(session, spec.model)
    _require_fit(
        orjson.dumps(spec.peft),
        spec.precision.type,
        spec.objective["type"],
        orjson.dumps(base.shape),
    )
    if spec.num_devices > (most := services.settings.worker.devices_per_job):
        raise InvalidRequestError(
            f"num_devices is {spec.num_devices}; the workers of this service give a job at most "
            f"{most}. Ask for fewer, or have TUNERY_WORKER__DEVICES_PER_JOB raised.",
            param="num_devices",
            code="devices_unavailable",
        )
    training_file = _trainable(session, caller, spec.training_file, "training_file")
    if spec.validation_file is not None:
        _trainable(session, caller, spec.validation_file, "validation_file")
    return training_file


@lru_cache(256)  # an error is not kept
def _require_fit(peft: bytes, precision: str, objective: str, shape: bytes) -> None:
    """Refuse what does not go with a base; `peft` and the base's `shape` are JSON."""
    # Without a shape, no process has seen the model's files yet.
    known = None if shape == b"null" else BaseShape.model_validate_json(shape)
    methods.require_fit(orjson.loads(peft), precision, known)
    if known is not None:
        objectives.get_objective(objective).require_base(known.family)


def _trainable(session: Session, caller: Caller, file_id: str, param: str) -> File:
    file = files.read(session, caller.project_id, file_id, param=param)
    if file.purpose != files.TRAINABLE:
        raise InvalidRequestError(
            f"File {file_id} has purpose '{file.purpose}'; it must be uploaded with purpose "
            f"'{files.TRAINABLE}'.",
            param=param,
            code="invalid_file_purpose",
        )
    return file


def delete_model(session: Session, services: Services, caller: Caller, name: str) -> None:
    """Delete a fine-tuned model; its objects go too unless another name stands for them."""
    orphan = adapters.delete(session, caller.project_id, name)
    note(session, caller, "model.deleted", name)
    if orphan is not None:
        after_commit(
            session,
            f"delete {orphan}",
            partial(delete_tree, services.store, adapter_prefix(orphan)),
        )


def merge_adapter(session: Session, services: Services, caller: Caller, name: str) -> Merge:
    """Ask for an adapter's merged model, and ring a worker.

    Raises:
        NotFoundError: this project has no such adapter.
        InvalidRequestError: it is none, or of a kind that is not merged (``not_mergeable``).
        PayloadTooLargeError: what the project may store does not suffice.
    """
    adapter = adapters.get_own(session, caller.project_id, name, "merged", "not_mergeable")
    base = session.get_one(BaseModel, adapter.base_model)
    is_decoder = merging.family_of(session, adapter) in (None, "decoder")
    if not (merging.can_merge(session, adapter) and is_decoder):
        raise InvalidRequestError(
            f"{name!r} cannot be merged: only adapters of causal language models whose method adds "
            "to the weights can be. Download the adapter instead.",
            param="model",
            code="not_mergeable",
        )
    merge, is_new = merges.want(session, caller.project_id, name)
    if is_new:
        quotas.check_bytes(session, caller.project_id, MERGED_BYTES * (base.n_parameters or 0))
        note(session, caller, "model.merge_requested", name, merge_id=merge.id)
        services.bell.ring_after_commit(session)
    return merge


def serve_adapter(session: Session, caller: Caller, name: str, *, merged: bool) -> Adapter:
    """Have an adapter answered by a merged copy of its base, or unmerged; twice is no error.

    Raises:
        NotFoundError: this project has no such adapter.
        InvalidRequestError: it is none, or is answered in the other way only (``not_mergeable``,
            ``always_merged``).
    """
    adapter = adapters.get_own(session, caller.project_id, name, "merged", "not_mergeable")
    if merged == bodies.is_merged(adapter):
        return adapter
    if (reason := merging.fixed(session, adapter)) is not None:
        raise InvalidRequestError(f"{name!r} {reason.why}", param="merged", code=reason.code)
    adapters.set_merged(session, name, merged=merged)
    session.refresh(adapter)
    note(session, caller, "model.serving_updated", name, merged=merged)
    return adapter
