"""Adapters from outside: kept only if an inference server loads them strictly."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from starlette.concurrency import run_in_threadpool

from api.adapters.archive import unpack
from api.audit import note
from api.deps import Caller
from api.services import Services
from models.domain.generation import AdapterRef
from models.domain.reports import AdapterManifest
from models.errors import (
    ConflictError,
    InvalidRequestError,
    UnavailableError,
    UnprocessableError,
)
from models.registry import adapters, base_models, inference_servers
from models.storage import (
    MANIFEST,
    ObjectNotFoundError,
    adapter_prefix,
    delete_tree,
    put_file,
)
from models.tables import Adapter


@dataclass(frozen=True, slots=True)
class Import:
    """An archive, the base model that it was trained on, and a part of its new name."""

    content: IO[bytes]
    base_model: str
    suffix: str


@dataclass(frozen=True, slots=True)
class _Stored:
    """An adapter whose objects are in the store and whose row is not there yet."""

    name: str
    manifest: AdapterManifest
    server_url: str
    is_new: bool

    @property
    def reference(self) -> AdapterRef:
        return AdapterRef(
            name=self.name,
            digest=self.manifest.digest,
            base_model=self.manifest.base_model,
            base_fingerprint=self.manifest.base_fingerprint,
        )


async def import_adapter(services: Services, caller: Caller, given: Import) -> Adapter:
    """Store an adapter, have it loaded on its base model, and give it a name.

    Every tensor must be used exactly once, with the rank and shapes that the base model wants, and
    nothing may be asked for that is not served; else nothing of it is kept.

    Raises:
        InvalidRequestError: the archive is not that of an adapter, or no inference server can load
            it (``invalid_adapter`` with the reason).
        PayloadTooLargeError: it is larger than a file may be.
        UnavailableError: no inference server holds the base model right now.
    """
    stored = await run_in_threadpool(_store, services, given)
    try:
        await services.inference.warm(stored.server_url, stored.reference)
        return await run_in_threadpool(_add, services, caller, stored)
    except (UnprocessableError, ConflictError) as error:
        await run_in_threadpool(_discard, services, stored)
        raise InvalidRequestError(error.message, param="file", code=error.code) from error
    except BaseException:
        await run_in_threadpool(_discard, services, stored)
        raise


def _store(services: Services, given: Import) -> _Stored:
    with services.database.read() as session:
        base = base_models.get(session, given.base_model)
        server = inference_servers.for_base(session, given.base_model)
    if base.vocab_size is None:
        raise UnavailableError(
            f"Base model {base.name!r} has not been loaded yet; try again in a moment.",
            param="model",
            retry_after=5,
        )
    with tempfile.TemporaryDirectory(prefix="tunery-import-") as scratch:
        limit = services.settings.api.max_upload_bytes
        digest, files = unpack(given.content, Path(scratch), limit)
        manifest = AdapterManifest(
            digest=digest,
            files=files,
            base_model=base.name,
            base_fingerprint=server.base_fingerprint,
            vocab_size=base.vocab_size,
            template_sha256="",
            method="lora",
            objective="imported",
            precision={},
            step=0,
            spec_sha256="",
            data_sha256="",
            versions={},
        )
        prefix = adapter_prefix(digest)
        is_new = not _is_stored(services, digest)
        if is_new:
            for file in files:
                put_file(services.store, f"{prefix}/{file.name}", Path(scratch) / file.name)
            services.store.put(f"{prefix}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())
    name = adapters.new_name(base.name, services.settings.api.organization, given.suffix)
    return _Stored(name, manifest, server.url, is_new)


def _is_stored(services: Services, digest: str) -> bool:
    try:
        services.store.get(f"{adapter_prefix(digest)}/{MANIFEST}")
    except ObjectNotFoundError:
        return False
    return True


def _add(services: Services, caller: Caller, stored: _Stored) -> Adapter:
    manifest = stored.manifest
    with services.database.write() as session:
        adapter = Adapter(
            name=stored.name,
            project_id=caller.project_id,
            base_model=manifest.base_model,
            digest=manifest.digest,
            bytes=sum(file.bytes for file in manifest.files),
            manifest=manifest.model_dump(mode="json"),
        )
        adapters.publish(session, adapter)
        note(session, caller, "model.imported", stored.name, digest=manifest.digest)
    return adapter


def _discard(services: Services, stored: _Stored) -> None:
    """Delete the objects of a refused adapter, unless they are another name's too."""
    digest = stored.manifest.digest
    with services.database.read() as session:
        is_used = adapters.is_referenced(session, digest)
    if stored.is_new and not is_used:
        delete_tree(services.store, adapter_prefix(digest))
