"""An engine that hands requests to vLLM, a process of its own, and makes its tokens into text.

Stop strings, the text and the counts are ours, as with our own engine; drawing tokens, batching
and the prefix cache are vLLM's, which knows an adapter by its digest only.
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Protocol, TypeVar

from models.errors import UnavailableError
from worker.inference.engine.engine import Emit, Ticket
from worker.inference.engine.errors import AdapterFormatError, EngineClosedError, EngineFullError
from worker.inference.engine.params import EngineStats, ModuleShape
from worker.inference.engine.pool import AdapterLease, AdapterPool
from worker.inference.engine.sequence import Request
from worker.inference.engine.stream import Decode
from worker.inference.vllm.adapters import Links, ServedAdapter, check_adapter, slot_bytes
from worker.inference.vllm.choice import Choice
from worker.inference.vllm.client import LOAD_SECONDS, VllmClient, VllmError
from worker.inference.vllm.wire import BASE

MAX_RUNNING = 256
"""Answers that vLLM may run at a time; it is started with this number."""

_MISSES = 5
"""How many questions for its health may go without a good answer before it counts as broken."""

_CALL_SECONDS = 3 * LOAD_SECONDS

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Process(Protocol):
    """What an engine needs of the process that it talks to."""

    @property
    def is_alive(self) -> bool: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class VllmLimits:
    """How vLLM was started: slots for adapters and their rank, answers that run; who may wait."""

    n_adapters: int = 16
    max_rank: int = 64
    max_running: int = MAX_RUNNING
    max_waiting: int = 64
    watch_seconds: float = 2.0
    """How often its health is asked for."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running vLLM."""

    process: Process
    client: VllmClient
    """Used on the engine's thread alone."""
    links: Links
    base: str = BASE
    """The name under which the base is asked."""


class _Ticket:
    def __init__(self, engine: "VllmEngine", choices: list[Choice]) -> None:
        self._engine = engine
        self._choices = choices

    def abort(self) -> None:
        for choice in self._choices:
            self._engine.abort(choice)


class VllmEngine:
    """An `Engine` over a vLLM server that has answered a token.

    As many adapters are loaded as vLLM has slots, so that a load never takes one that is in use.

    Args:
        server: Its process and its endpoints, and where it finds adapters; all closed by `close`.
        shapes: The modules of the base that adapters may change.
        decode: Token ids to text.
        stop_ids: Tokens that end an answer.
        limits: How it was started.
    """

    def __init__(
        self,
        server: Server,
        shapes: Mapping[str, ModuleShape],
        decode: Decode,
        stop_ids: Iterable[int],
        limits: VllmLimits | None = None,
    ) -> None:
        self._process = server.process
        self._client = server.client
        self._links = server.links
        self._base = server.base
        self._shapes = shapes
        self._decode = decode
        self._stop_ids = frozenset(stop_ids)
        self._limits = limits or VllmLimits()
        self._slot_bytes = slot_bytes(shapes, self._limits.max_rank)
        self._pool = AdapterPool(self._limits.n_adapters * self._slot_bytes)
        self._loading = Lock()
        self._lock = Lock()
        self._choices: dict[Choice, asyncio.Task[None] | None] = {}
        self._closing = False
        self._broken = False
        self._ended = EngineStats(alive=True, running=0, waiting=0)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def acquire(self, digest: str) -> AdapterLease | None:
        return self._pool.acquire(digest)

    def load(self, digest: str, directory: Path) -> AdapterLease:
        """As the protocol says; loads follow each other.

        Raises:
            UnavailableError: vLLM does not answer.
        """
        changes = check_adapter(directory, digest, self._shapes, self._limits.max_rank)
        with self._loading:
            lease = self._pool.acquire(digest)
            if lease is not None:
                return lease
            for evicted in self._pool.make_room(self._slot_bytes):
                self._forget(evicted)
            path = self._links.add(digest, directory)
            try:
                self._call(self._load(digest, path, changes))
            except BaseException:
                self._links.remove(digest)
                raise
            return self._pool.admit(ServedAdapter(digest, {}, slot_bytes=self._slot_bytes))

    async def _load(self, digest: str, path: Path, changes: bool) -> None:
        try:
            await self._client.load(digest, path)
        except VllmError as error:
            if error.status is None:
                raise
            raise AdapterFormatError("refused_by_vllm", str(error)) from error
        # vLLM leaves out what it does not find in its own model, and then answers as the base.
        if changes and await self._client.probe(digest) == await self._client.probe(self._base):
            await self._client.unload(digest)
            raise AdapterFormatError("no_effect", "with it vLLM answers as the base model does")

    def unload(self, digest: str) -> int:
        """As the protocol says; vLLM gives the slot to the next adapter, not the memory back."""
        with self._loading:
            n_bytes = self._pool.remove(digest)
            if n_bytes:
                self._forget(digest)
            return n_bytes

    def _forget(self, digest: str) -> None:
        self._call(self._client.unload(digest))
        self._links.remove(digest)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the engine's thread; blocks."""
        if not self._is_alive():
            work.close()
            raise UnavailableError("vLLM has stopped.", code="engine_stopped", retry_after=5)
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_SECONDS)
        except (VllmError, CancelledError, TimeoutError) as error:
            logger.warning("vLLM failed at an adapter: %r", error)
            raise UnavailableError(
                f"The adapter could not be brought into vLLM: {error} Try again shortly.",
                code="adapter_loading_failed",
                retry_after=5,
            ) from error

    def audit(self) -> dict[str, int]:
        return self._pool.audit()

    def submit(self, request: Request, emit: Emit) -> Ticket:
        if not request.prompt:
            raise ValueError("A prompt needs at least one token.")
        with self._lock:
            if not self._is_alive():
                raise EngineClosedError("vLLM has stopped.")
            limit = self._limits.max_running + self._limits.max_waiting
            if len(self._choices) + request.n > limit:
                raise EngineFullError(f"{len(self._choices)} sequences run and wait already.")
            choices = [
                Choice(request, index, partial(emit, index), self._decode, self._stop_ids)
                for index in range(request.n)
            ]
            self._choices |= dict.fromkeys(choices)
            self._loop.call_soon_threadsafe(self._start, choices)
        return _Ticket(self, choices)

    def abort(self, choice: Choice) -> None:
        """Stop an answer; its connection is closed, at which vLLM stops too."""
        choice.end()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing runs any more
            self._loop.call_soon_threadsafe(self._cancel, choice)

    def _start(self, choices: list[Choice]) -> None:
        for choice in choices:
            if choice in self._choices and not self._closing:
                task = self._loop.create_task(choice.run(self._client, self._base))
                self._choices[choice] = task
                task.add_done_callback(partial(self._done, choice))

    def _cancel(self, choice: Choice) -> None:
        task = self._choices.get(choice)
        if task is not None:
            task.cancel()
        else:
            self._done(choice)

    def _done(self, choice: Choice, _: asyncio.Task[None] | None = None) -> None:
        choice.end()
        with self._lock:
            if self._choices.pop(choice, None) is not None:
                self._ended = replace(
                    self._ended,
                    n_drawn=self._ended.n_drawn + choice.n_tokens,
                    n_prompt=self._ended.n_prompt + choice.n_prompt,
                    n_cached=self._ended.n_cached + choice.n_cached,
                )

    def stats(self) -> EngineStats:
        with self._lock:
            choices = list(self._choices)
            return replace(
                self._ended,
                alive=self._is_alive(),
                running=min(len(choices), self._limits.max_running),
                waiting=max(0, len(choices) - self._limits.max_running),
                references=self._pool.references(),
                adapter_bytes=self._pool.n_bytes,
                slots=len(self._pool.references()),
                distinct_adapters=len({each.adapter for each in choices} - {None}),
                host_evictions=self._pool.evictions,
                n_drawn=self._ended.n_drawn + sum(each.n_tokens for each in choices),
                n_prompt=self._ended.n_prompt + sum(each.n_prompt for each in choices),
                n_cached=self._ended.n_cached + sum(each.n_cached for each in choices),
            )

    def _is_alive(self) -> bool:
        return not self._closing and not self._broken and self._process.is_alive

    def close(self) -> None:
        """As the protocol says, and stop vLLM."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._process.stop()
        self._links.close()

    def _run(self) -> None:
        watch = self._loop.create_task(self._watch())  # kept: a loop does not hold its tasks
        try:
            self._loop.run_forever()
        finally:
            with self._lock:
                self._closing = True
            for choice in list(self._choices):
                choice.fail(EngineClosedError("The engine was closed."))
            watch.cancel()
            self._loop.run_until_complete(self._leave())
            self._loop.close()

    async def _leave(self) -> None:
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    async def _watch(self) -> None:
        """Find out that vLLM is gone or hangs; what still waits for it then fails."""
        missed = 0
        while self._process.is_alive and missed < _MISSES:
            await asyncio.sleep(self._limits.watch_seconds)
            missed = 0 if await self._client.is_healthy() else missed + 1
        logger.error("vLLM has %s.", "stopped answering" if self._process.is_alive else "ended")
        self._broken = True
        await asyncio.to_thread(self._process.stop)
