"""Adapters that are answered outside the batch, each as a model of its own beside the base.

An adapter whose manifest says ``merged`` or ``own``, or whose owner wants it merged, gets a copy of
the base with an engine around it. Copies are large: few are kept, and the one used least recently
makes room.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from models.domain.generation import AdapterRef
from models.domain.reports import AdapterManifest
from models.errors import CapacityError, UnavailableError
from worker.adapter_format import invalid_adapter
from worker.inference.adapter_store import AdapterStore
from worker.inference.engine.engine import Engine
from worker.inference.metrics import Metrics, OwnModelStats
from worker.inference.residency import require_template

LOAD_SECONDS = 120.0
"""How long a request waits for a model to be made; that goes on and serves the next one."""

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """An engine around a model of its own, the bytes of its weights, and the merge's drift."""

    engine: Engine
    n_bytes: int
    drift: float | None


Build = Callable[[Path, str], Built]
"""Makes the engine of the adapter in a directory, served as `load_own_model` says; blocks."""

_Key = tuple[str, str]
"""Digest and way: of two names for one content, only one may be wanted merged."""


class OwnModels:
    """Engines by adapter.

    Args:
        adapters: Where the adapters come from.
        template_sha256: The chat template that this server renders with.
        build: Makes an engine.
        limit: Most models beside the base.
        batches: Whether adapters may be served in one batch with the base, as their manifests say.
        metrics: Where loads and evictions are counted.
    """

    def __init__(
        self,
        adapters: AdapterStore,
        template_sha256: str,
        build: Build,
        limit: int,
        *,
        batches: bool = True,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._batches = batches
        self._adapters = adapters
        self._template_sha256 = template_sha256
        self._build = build
        self._limit = limit
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="own-model")
        self._models: OrderedDict[_Key, Built] = OrderedDict()
        self._users: Counter[_Key] = Counter()  # those that wait for it included
        self._served: dict[str, str] = {}
        self._making: dict[_Key, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def hold(self, ref: AdapterRef | None) -> AsyncIterator[Engine | None]:
        """Give the engine of an adapter that has a model of its own, or None where it has not.

        Raises:
            NotFoundError, ConflictError, UnprocessableError: as `Residency.acquire`; merged, it
                is another model, or it cannot be merged.
            CapacityError: all models beside the base are in use.
            UnavailableError: it takes too long, or the store does not answer.
        """
        if ref is None or (way := await self._way(ref)) == "batched":
            yield None
            return
        key = (ref.digest, way)
        self._users[key] += 1
        try:
            yield (await self._model(ref, key)).engine
        finally:
            self._users[key] -= 1

    async def _way(self, ref: AdapterRef) -> str:
        """Return how an adapter is answered: as it is wanted, else as its manifest says."""
        self._adapters.check_base(ref)
        if ref.merged:
            return "merged"
        if ref.digest not in self._served:  # content never changes: it is asked for once
            self._served[ref.digest] = await asyncio.to_thread(self._read, ref)
        return self._served[ref.digest]

    def _read(self, ref: AdapterRef) -> str:
        with self._adapters.open(ref) as (_, manifest):
            return self._manifest_way(manifest)

    def _manifest_way(self, manifest: AdapterManifest) -> str:
        return "own" if manifest.served == "batched" and not self._batches else manifest.served

    async def _model(self, ref: AdapterRef, key: _Key) -> Built:
        if key not in self._models:
            making = self._making.get(key)
            if making is None:
                making = asyncio.create_task(self._make(ref, key))
                self._making[key] = making
                making.add_done_callback(lambda _: self._making.pop(key))
            try:
                async with asyncio.timeout(LOAD_SECONDS):
                    await asyncio.shield(making)
            except TimeoutError:
                raise UnavailableError(
                    f"The model of adapter {ref.name!r} is still being made. Try again shortly.",
                    param="model",
                    code="adapter_loading",
                    retry_after=10,
                ) from None
        self._models.move_to_end(key)
        return self._models[key]

    async def _make(self, ref: AdapterRef, key: _Key) -> None:
        loop = asyncio.get_running_loop()
        while len(self._models) + len(self._making) > self._limit:
            idle = next((each for each in self._models if not self._users[each]), None)
            if idle is None:
                raise CapacityError(
                    f"There is no room for adapter {ref.name!r}, which needs a model of its own: "
                    "all of them are in use. Raise TUNERY_INFERENCE__MAX_OWN_MODELS, or wait.",
                    param="model",
                    code="adapter_capacity",
                    retry_after=5,
                )
            self._metrics.own_evictions.inc()
            await loop.run_in_executor(self._executor, self._models.pop(idle).engine.close)
        self._models[key] = await loop.run_in_executor(self._executor, self._load, ref, key[1])

    def _load(self, ref: AdapterRef, way: str) -> Built:
        with self._adapters.open(ref) as (directory, manifest):
            require_template(ref, manifest, self._template_sha256)
            try:
                # What is merged for its speed is held as the base is.
                for_speed = way == "merged" and manifest.served == "batched"
                built = self._build(directory, "rounded" if for_speed else way)
            except (KeyError, ValueError, RuntimeError) as error:
                logger.warning("own_model_failed", digest=ref.digest, error=repr(error))
                self._metrics.own_loads.labels(way, "refused").inc()
                raise invalid_adapter("not_loadable", str(error)) from error
        self._metrics.own_loads.labels(way, "ok").inc()
        logger.info(
            "own_model", digest=ref.digest, served=way, n_bytes=built.n_bytes, drift=built.drift
        )
        return built

    def stats(self) -> list[OwnModelStats]:
        """Return what each model is and does right now, the one used least recently first."""
        found = []
        for (digest, way), built in list(self._models.items()):
            engine = built.engine.stats()
            found.append(
                OwnModelStats(
                    digest=digest,
                    served=way,
                    n_bytes=built.n_bytes,
                    drift=built.drift,
                    running=engine.running,
                    waiting=engine.waiting,
                )
            )
        return found

    def close(self) -> None:
        """End what still runs on them and stop their engines."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for built in self._models.values():
            built.engine.close()
