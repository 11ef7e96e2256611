"""Adapters on the local disk: fetched from the object store once, checked every time.

An adapter lies in ``DIRECTORY/DIGEST``. It appears there by a rename, after its checksums were
compared, and is checked again whenever it is opened: a damaged copy is fetched anew. Several
servers may share the directory.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from obstore.exceptions import BaseError

from models.domain.generation import AdapterRef
from models.domain.reports import AdapterManifest
from models.errors import (
    ConflictError,
    NotFoundError,
    TuneryError,
    UnavailableError,
    UnprocessableError,
)
from models.storage import MANIFEST, ObjectNotFoundError, ObjectStore, adapter_prefix, fetch_file
from worker.adapter_format import (
    digest_of,
    invalid_adapter,
    is_digest,
    parse_manifest,
    read_manifest,
)
from worker.base_models import BaseModelInfo
from worker.inference.metrics import Metrics
from worker.inference.single_flight import SingleFlight

DEFAULT_BUDGET_BYTES = 20 * 1024**3
_INCOMING = ".incoming-"
_ABANDONED_SECONDS = 3600.0

logger = structlog.get_logger(__name__)


class AdapterStore:
    """A disk cache of adapters of one base model.

    Args:
        store: Where the adapters come from.
        directory: Where the local copies are.
        base: The base model that they must fit.
        budget_bytes: Size above which the copies opened least recently are removed.
        metrics: Where hits, fetches and evictions are counted.
    """

    def __init__(
        self,
        store: ObjectStore,
        directory: Path,
        base: BaseModelInfo,
        *,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._store = store
        self._directory = directory.expanduser().resolve()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._base = base
        self._budget_bytes = budget_bytes
        self._fetches: SingleFlight[AdapterManifest] = SingleFlight()

    @contextmanager
    def open(self, ref: AdapterRef) -> Iterator[tuple[Path, AdapterManifest]]:
        """Give the local directory of an adapter, which stays while the block runs; blocks.

        Raises:
            NotFoundError: the store has no adapter of this digest.
            ConflictError: it belongs to another base model.
            UnprocessableError: its files are damaged or are not what the manifest says.
            UnavailableError: the store, or the disk, does not answer.
        """
        self.check_base(ref)
        with self._reading():
            manifest = self._fetches.run(ref.digest, lambda: self._provide(ref))
            self._same_base(ref, manifest.base_model, manifest.base_fingerprint)
            yield self._directory / ref.digest, manifest
        self._evict()

    def check_base(self, ref: AdapterRef) -> None:
        """Raise `NotFoundError` if `ref` has no digest, `ConflictError` if it has another base."""
        if not is_digest(ref.digest):
            raise _unknown(ref)
        self._same_base(ref, ref.base_model, ref.base_fingerprint)

    def _same_base(self, ref: AdapterRef, name: str, fingerprint: str) -> None:
        if fingerprint != self._base.fingerprint:
            raise ConflictError(
                f"Adapter {ref.name!r} was trained on base model {name!r} with fingerprint "
                f"{fingerprint}, but this server holds {self._base.name!r} with fingerprint "
                f"{self._base.fingerprint}. Train it again on the base model that is served.",
                param="model",
                code="wrong_base_model",
            )

    def _provide(self, ref: AdapterRef) -> AdapterManifest:
        target, source = self._directory / ref.digest, "disk"
        try:
            manifest = _checked(target, ref.digest) if target.is_dir() else None
            if manifest is None:
                source = "store"
                with self._metrics.load_seconds.labels("fetch").time():
                    manifest = self._fetch(ref, target)
            else:
                self._metrics.hits.labels("disk").inc()
            os.utime(target)
        except (OSError, BaseError) as error:
            logger.warning("adapter_fetch_failed", digest=ref.digest, error=repr(error))
            self._metrics.loads.labels(source, "unavailable").inc()
            raise UnavailableError(
                f"Adapter {ref.name!r} cannot be fetched at the moment "
                f"({type(error).__name__}). Try again shortly.",
                code="adapter_store_unavailable",
                retry_after=5,
            ) from error
        except TuneryError:
            self._metrics.loads.labels(source, "refused").inc()
            raise
        self._metrics.loads.labels(source, "ok").inc()
        return manifest

    def _fetch(self, ref: AdapterRef, target: Path) -> AdapterManifest:
        prefix = adapter_prefix(ref.digest)
        try:
            manifest_bytes = self._store.get(f"{prefix}/{MANIFEST}")
        except ObjectNotFoundError:
            raise _unknown(ref) from None
        manifest = parse_manifest(manifest_bytes)
        if manifest.digest != ref.digest:
            raise invalid_adapter(
                "digest_mismatch", f"the adapter stored as {ref.digest} is {manifest.digest}"
            )
        incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._directory))
        try:
            for file in manifest.files:
                try:
                    fetch_file(
                        self._store,
                        f"{prefix}/{file.name}",
                        incoming / file.name,
                        sha256=file.sha256,
                    )
                except ObjectNotFoundError:
                    raise invalid_adapter("missing_file", f"the store lacks {file.name}") from None
                except ValueError as error:
                    raise invalid_adapter("checksum_mismatch", str(error)) from error
            (incoming / MANIFEST).write_bytes(manifest_bytes)
            self._remove(target)
            incoming.rename(target)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        return manifest

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with (self._directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def _evict(self) -> None:
        """Remove the oldest copies above the budget, unless somebody is reading just now."""
        with (self._directory / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # whoever is reading comes here afterwards
            for path in self._directory.glob(f"{_INCOMING}*"):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(path)
            copies = [path for path in self._directory.iterdir() if is_digest(path.name)]
            copies.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
            total = 0
            for path in copies:
                total += sum(file.stat().st_size for file in path.iterdir())
                if total > self._budget_bytes:
                    self._remove(path)
                    self._metrics.disk_evictions.inc()

    def _remove(self, path: Path) -> None:
        # By a rename first: nobody ever sees half a directory under a digest.
        doomed = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._directory))
        try:
            path.rename(doomed / path.name)
        except FileNotFoundError:
            pass  # there was nothing to remove
        finally:
            shutil.rmtree(doomed)


def _checked(directory: Path, digest: str) -> AdapterManifest | None:
    """Return the manifest of a local copy, or None where the copy is damaged."""
    try:
        manifest = read_manifest(directory)
        if manifest.digest == digest == digest_of(directory)[0]:
            return manifest
    except (FileNotFoundError, UnprocessableError) as error:
        logger.warning("adapter_copy_unreadable", digest=digest, error=repr(error))
    logger.warning("adapter_copy_damaged", digest=digest)
    return None


def _unknown(ref: AdapterRef) -> NotFoundError:
    return NotFoundError(
        f"The model {ref.name!r} does not exist: there is no adapter {ref.digest!r}.",
        param="model",
        code="model_not_found",
    )
