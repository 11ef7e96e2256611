"""Getting an adapter into the engine's memory, once for everybody who waits for it."""

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from models.domain.generation import AdapterRef
from models.domain.reports import AdapterManifest
from models.errors import (
    CapacityError,
    ConflictError,
    NotFoundError,
    TuneryError,
    UnavailableError,
    UnprocessableError,
)
from worker.adapter_format import invalid_adapter
from worker.inference.adapter_store import AdapterStore
from worker.inference.answer import shutting_down
from worker.inference.engine.engine import Engine
from worker.inference.engine.errors import AdapterFormatError, AdapterPoolFullError
from worker.inference.engine.pool import AdapterLease
from worker.inference.metrics import Metrics

LOAD_SECONDS = 30.0
"""How long a request waits for its adapter; the load itself goes on and serves the next one."""

FAILURE_SECONDS = {
    NotFoundError: 2.0,
    ConflictError: 30.0,
    UnprocessableError: 30.0,
    UnavailableError: 2.0,
}
"""How long a failed load is not tried again, by its cause: what cannot change is remembered longer.
A full memory is not remembered at all, since any request that ends may make room."""

_PARALLEL_LOADS = 8
_ROUNDS = 3
"""How often an adapter is loaded again when it was evicted before the request got its lease."""


class Residency:
    """Leases on adapters, loaded off the event loop; different adapters load side by side.

    Args:
        engine: Where the adapters go.
        adapters: Where they come from.
        template_sha256: The chat template that this server renders with.
        load_seconds: How long a request waits for its adapter.
        metrics: Where hits, loads and refusals are counted.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: AdapterStore,
        template_sha256: str,
        *,
        load_seconds: float = LOAD_SECONDS,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._engine = engine
        self._adapters = adapters
        self._template_sha256 = template_sha256
        self._load_seconds = load_seconds
        self._executor = ThreadPoolExecutor(_PARALLEL_LOADS, thread_name_prefix="adapter-load")
        self._loads: dict[str, asyncio.Future[None]] = {}
        self._failures: dict[str, tuple[TuneryError, float]] = {}
        self._closed = False

    async def acquire(self, ref: AdapterRef) -> AdapterLease:
        """Return a lease on an adapter, loading it where it is not in memory.

        Raises:
            NotFoundError, ConflictError, UnprocessableError: it does not exist, belongs to another
                base model or chat template, or cannot be used.
            CapacityError: every adapter in memory is in use.
            UnavailableError: it takes too long, or the store does not answer.
        """
        try:
            return await self._acquire(ref)
        except TuneryError as error:
            self._metrics.rejects.labels(error.code or type(error).__name__).inc()
            raise

    async def _acquire(self, ref: AdapterRef) -> AdapterLease:
        self._adapters.check_base(ref)
        for attempt in range(_ROUNDS):
            lease = self._engine.acquire(ref.digest)
            if lease is not None:
                if attempt == 0:
                    self._metrics.hits.labels("host").inc()
                return lease
            if self._closed:
                raise shutting_down()
            self._raise_known_failure(ref.digest)
            try:
                async with asyncio.timeout(self._load_seconds):
                    await asyncio.shield(self._loading(ref))
            except TimeoutError:
                raise UnavailableError(
                    f"Adapter {ref.name!r} is still being loaded. Try again in a moment.",
                    param="model",
                    code="adapter_loading",
                    retry_after=5,
                ) from None
        raise _no_room(ref)

    def _loading(self, ref: AdapterRef) -> asyncio.Future[None]:
        load = self._loads.get(ref.digest)
        if load is None:
            load = asyncio.get_running_loop().run_in_executor(self._executor, self._load, ref)
            self._loads[ref.digest] = load
            load.add_done_callback(lambda done: self._loaded(ref.digest, done))
        return load

    def _loaded(self, digest: str, load: asyncio.Future[None]) -> None:
        del self._loads[digest]
        if load.cancelled():
            return
        error = load.exception()  # all who waited may be gone: then nobody else looks at it
        if isinstance(error, TuneryError) and type(error) in FAILURE_SECONDS:
            until = monotonic() + FAILURE_SECONDS[type(error)]
            self._failures[digest] = (error, until)

    def _raise_known_failure(self, digest: str) -> None:
        now = monotonic()
        self._failures = {key: each for key, each in self._failures.items() if each[1] > now}
        if digest in self._failures:
            raise copy.copy(self._failures[digest][0])

    def _load(self, ref: AdapterRef) -> None:
        with self._adapters.open(ref) as (directory, manifest):
            require_template(ref, manifest, self._template_sha256)
            try:
                with self._metrics.load_seconds.labels("validate").time():
                    self._engine.load(ref.digest, directory).release()
            except AdapterFormatError as error:
                raise invalid_adapter(error.reason, error.detail) from error
            except AdapterPoolFullError:
                raise _no_room(ref) from None

    def close(self) -> None:
        """Take no more loads; one in progress is left to end by itself."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)


def require_template(ref: AdapterRef, manifest: AdapterManifest, sha256: str) -> None:
    """Raise `ConflictError` unless an adapter was trained with the template of this digest.

    What came from outside does not say what it was trained with.
    """
    if manifest.template_sha256 not in ("", sha256):
        raise ConflictError(
            f"Adapter {ref.name!r} was trained with chat template {manifest.template_sha256}, but "
            f"this server renders with {sha256}. Train it again.",
            param="model",
            code="wrong_chat_template",
        )


def _no_room(ref: AdapterRef) -> CapacityError:
    return CapacityError(
        f"There is no room for adapter {ref.name!r}: all adapters in memory are in use.",
        param="model",
        code="adapter_capacity",
        retry_after=2,
    )
