"""Adapters that no batch can serve, each as a model of its own beside the base.

An adapter whose manifest says ``merged`` or ``own`` gets a copy of the base with an engine around
it. Copies are large: few are kept, and the one used least recently makes room.
"""

import asyncio
from collections import OrderedDict
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
from worker.inference.residency import require_template

LOAD_SECONDS = 120.0
"""How long a request waits for a model to be made; that goes on and serves the next one."""

logger = structlog.get_logger(__name__)

Build = Callable[[Path, str], Engine]
"""Makes the engine of the adapter in a directory, given its manifest's ``served``; blocks."""


@dataclass(slots=True)
class _Own:
    engine: Engine
    n_users: int = 0


class OwnModels:
    """Engines by adapter digest.

    Args:
        adapters: Where the adapters come from.
        template_sha256: The chat template that this server renders with.
        build: Makes an engine.
        limit: Most models beside the base.
        load_seconds: How long a request waits for one.
        batches: Whether adapters may be served in one batch with the base, as their manifests say.
    """

    def __init__(
        self,
        adapters: AdapterStore,
        template_sha256: str,
        build: Build,
        limit: int,
        *,
        load_seconds: float = LOAD_SECONDS,
        batches: bool = True,
    ) -> None:
        self._batches = batches
        self._adapters = adapters
        self._template_sha256 = template_sha256
        self._build = build
        self._limit = limit
        self._load_seconds = load_seconds
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="own-model")
        self._models: OrderedDict[str, _Own] = OrderedDict()
        self._served: dict[str, str] = {}
        self._making: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def hold(self, ref: AdapterRef | None) -> AsyncIterator[Engine | None]:
        """Give the engine of an adapter that has a model of its own, or None where it has not.

        Raises:
            NotFoundError, ConflictError, UnprocessableError: as `Residency.acquire`.
            CapacityError: all models beside the base are in use.
            UnavailableError: it takes too long, or the store does not answer.
        """
        if ref is None or await self._served_how(ref) == "batched":
            yield None
            return
        own = await self._model(ref)
        own.n_users += 1
        try:
            yield own.engine
        finally:
            own.n_users -= 1

    async def _served_how(self, ref: AdapterRef) -> str:
        """Return how an adapter is served; content never changes, so it is asked for once."""
        self._adapters.check_base(ref)
        if ref.digest not in self._served:
            self._served[ref.digest] = await asyncio.to_thread(self._read, ref)
        return self._served[ref.digest]

    def _read(self, ref: AdapterRef) -> str:
        with self._adapters.open(ref) as (_, manifest):
            return self._way(manifest)

    def _way(self, manifest: AdapterManifest) -> str:
        return "own" if manifest.served == "batched" and not self._batches else manifest.served

    async def _model(self, ref: AdapterRef) -> _Own:
        if ref.digest not in self._models:
            making = self._making.get(ref.digest)
            if making is None:
                making = asyncio.create_task(self._make(ref))
                self._making[ref.digest] = making
                making.add_done_callback(lambda _: self._making.pop(ref.digest))
            try:
                async with asyncio.timeout(self._load_seconds):
                    await asyncio.shield(making)
            except TimeoutError:
                raise UnavailableError(
                    f"The model of adapter {ref.name!r} is still being made. Try again shortly.",
                    param="model",
                    code="adapter_loading",
                    retry_after=10,
                ) from None
        self._models.move_to_end(ref.digest)
        return self._models[ref.digest]

    async def _make(self, ref: AdapterRef) -> None:
        loop = asyncio.get_running_loop()
        while len(self._models) + len(self._making) > self._limit:
            idle = next((digest for digest, own in self._models.items() if not own.n_users), None)
            if idle is None:
                raise CapacityError(
                    f"There is no room for adapter {ref.name!r}, which needs a model of its own: "
                    "all of them are in use. Raise TUNERY_INFERENCE__MAX_OWN_MODELS, or wait.",
                    param="model",
                    code="adapter_capacity",
                    retry_after=5,
                )
            await loop.run_in_executor(self._executor, self._models.pop(idle).engine.close)
        engine = await loop.run_in_executor(self._executor, self._load, ref)
        self._models[ref.digest] = _Own(engine)

    def _load(self, ref: AdapterRef) -> Engine:
        with self._adapters.open(ref) as (directory, manifest):
            require_template(ref, manifest, self._template_sha256)
            try:
                engine = self._build(directory, self._way(manifest))
            except (KeyError, ValueError, RuntimeError) as error:
                logger.warning("own_model_failed", digest=ref.digest, error=repr(error))
                raise invalid_adapter("not_loadable", str(error)) from error
        logger.info("own_model", digest=ref.digest, served=self._way(manifest))
        return engine

    def close(self) -> None:
        """End what still runs on them and stop their engines."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for own in self._models.values():
            own.engine.close()
